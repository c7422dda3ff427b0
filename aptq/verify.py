"""A written model is not done until it loads and agrees with the one in memory."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from aptq.api import AptqError
from aptq.calibration.walk import Walk

_log = logging.getLogger(__name__)
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest logit


def verify(folder: Path, walk: Walk, backend: str) -> float:
    """Load a written model as a user would and compare its logits with those that the walk ended on.

    Returns:
        the largest difference, as a share of the largest logit.

    Raises:
        AptqError: when they disagree: the checkpoint is not what was quantized.
    """
    from aptq.hf import load  # imports transformers: heavy

    model = load(folder, backend=backend).to(walk.fabric.device)  # type: ignore[arg-type]  # transformers hides the signature
    loaded, expected = walk.logits_of(model), walk.logits()
    difference: float = ((loaded - expected).abs().max() / expected.abs().max()).item()
    if not difference <= _TOLERANCE.get(model.dtype, 1e-1):
        raise AptqError(
            f"The written model disagrees with the one in memory: logits differ by {difference:.2g} of the largest. "
            "This is a fault of the exporter, the format or the backend; the blocks are kept in the run folder."
        )
    _log.info("The written model loads and agrees with the one in memory (largest difference %.1e).", difference)
    return difference
