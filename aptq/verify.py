"""A written model is not done until it loads and agrees with the one in memory.

One block is in memory at a time, as in the rest of a run: what could be quantized can be checked.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aptq.api import AptqError
from aptq.backends.select import installed_backends
from aptq.calibration.walk import Walk
from aptq.layer import PackedLinear
from aptq.models.opening import assign, exchanged
from aptq.models.weights import Checkpoint, Piece, Recipe

_log = logging.getLogger(__name__)
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest logit
CHECKED = 128  # tokens of a sample: a block's later tokens do not change its earlier outputs
_FAULT = "This is a fault of the exporter, the format or the backend; the blocks are kept in the run folder."


def verify(folder: Path, walk: Walk, expected: Tensor, backend: str | Mapping[str, Any]) -> float:
    """Hold a written model against the quantized one in memory.

    transformers loads it as it would for a user, but for the data; its files hold the tensors of that model and no
    others; what was not quantized, and an embedding that was, is as it was, bit for bit; and the beginning of a sample,
    sent block by block through the packed layers, ends in the same logits.

    Args:
        folder: the written model.
        walk: the walk that its calibration took, with the quantized embedding if there is one.
        expected: logits ``[1, tokens, vocabulary]`` (``Walk.logits``) of the quantized model for the first ``CHECKED``
            tokens of the first sample, from weights that were never written by an exporter.
        backend: what multiplies the packed layers.

    Returns:
        the largest difference of the logits, as a share of the largest logit.

    Raises:
        AptqError: when they disagree: the checkpoint is not what was quantized.
    """
    from aptq.hf import load  # imports transformers: heavy

    written = _Written(folder)
    skeleton = load(folder, backend=backend, device_map={"": "meta"})
    written.check_names(set(skeleton.state_dict()) - set(skeleton.all_tied_weights_keys))
    for name, tensor in walk.source.other_tensors():
        _check_same(name, tensor, written)
    for name, module in walk.outside.items():
        for short, tensor in module.state_dict().items():
            _check_same(f"{name}.{short}", tensor, written)
    found = _logits(walk.beginning(1, CHECKED), skeleton, written, backend)
    difference: float = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= _TOLERANCE.get(walk.source.dtype, 1e-1):
        raise AptqError(
            f"The written model disagrees with the one in memory: logits differ by {difference:.2g} of the largest. "
            f"{_FAULT}"
        )
    _log.info("The written model loads and agrees with the one in memory (largest difference %.1e).", difference)
    return difference


class _Written:
    """The tensors of a model folder, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._checkpoint = Checkpoint(sorted(folder.glob("*.safetensors")))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors by name, copied: nothing stays mapped."""
        recipes = {name: Recipe(((Piece(name),),)) for name in names}
        return {name: tensor.clone() for name, tensor in self._checkpoint.read(recipes)}

    def check_names(self, expected: set[str]) -> None:
        """Raise ``AptqError`` unless exactly these tensors are there."""
        names = set(self._checkpoint.shapes)
        if names != expected:
            raise AptqError(
                f"The written model lacks {sorted(expected - names)[:3]} and has {sorted(names - expected)[:3]} too "
                f"many. {_FAULT}"
            )


def _check_same(name: str, tensor: Tensor, written: _Written) -> None:
    if not torch.equal(written.read([name])[name], tensor.cpu()):
        raise AptqError(f"{name} in the written model is not what it was before. {_FAULT}")


def _logits(walk: Walk, skeleton: nn.Module, written: _Written, backend: str | Mapping[str, Any]) -> Tensor:
    """Send a walk through the packed modules of a loaded model without data, and return its logits."""
    layers = walk.source.layer_shapes()
    installed, _ = installed_backends()

    def filled(names: Iterable[str]) -> dict[str, nn.Module]:
        modules = copy.deepcopy({name: skeleton.get_submodule(name) for name in names})  # they may share tensors
        for name, module in modules.items():
            tensors = written.read(f"{name}.{key}" for key in module.state_dict())
            for key in module.state_dict():
                assign(module, key, tensors[f"{name}.{key}"].to(walk.fabric.device))
        for module in modules.values():
            if isinstance(module, PackedLinear):
                module.select_backend(backend, installed)
        return modules

    def packed(names: Iterable[str]) -> AbstractContextManager[None]:
        return exchanged(walk.source.model, filled(name for name in names if name in layers))

    walk = walk.between(filled(walk.outside))
    for step in walk.blocks():
        with packed(step.block.layers):
            step.run()
    with packed([walk.source.head_name or ""]):
        return walk.logits()
