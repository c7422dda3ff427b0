"""How much the model's loss minds an error at a module's output, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from aptq.api import AptqError, Block, Callback, GuidedEstimator
from aptq.calibration.backward import BackwardPass, Seen
from aptq.calibration.walk import Walk
from aptq.files import write_tensors

STAGE = "gradients"


@dataclass(frozen=True)
class Guidance:
    """The mean squares of gradients on disk, one file a block: what ``Block.guidance`` is filled with."""

    folder: Path
    rank: int
    device: torch.device

    def __call__(self, index: int) -> dict[str, Tensor]:
        """Return those of a block: ``[all samples, tokens, groups]``, float32, by module."""
        return load_file(self.path(index), device=str(self.device))

    def path(self, index: int) -> Path:
        """Return where those of a block are."""
        return self.folder / f"squares-{self.rank}-{index:04d}.safetensors"


def measure_guidance(walk: Walk, estimator: GuidedEstimator, folder: Path, callbacks: Callback) -> Guidance:
    """Return what an estimator asked for, from ``folder`` where it is there already.

    Raises:
        AptqError: the estimator cannot measure one of the blocks, or gradients are not finite.
    """
    guidance = Guidance(folder, walk.fabric.global_rank, walk.fabric.device)
    if not all(guidance.path(index).exists() for index in range(walk.source.num_steps)):
        tap = _Squares(estimator, len(walk.samples), guidance)
        BackwardPass(walk=walk, tap=tap, folder=folder, callbacks=callbacks, stage=STAGE).run()
    return guidance


@dataclass
class _Squares:
    """Mean squares over groups of channels, by module: ``[all samples, tokens, groups]``."""

    estimator: GuidedEstimator
    num_samples: int
    guidance: Guidance
    _index: int = 0
    _wanted: Mapping[str, int] = field(default_factory=dict)
    _found: dict[str, Tensor] = field(default_factory=dict)

    @property
    def labels(self) -> str | None:
        return self.estimator.labels

    @property
    def seed(self) -> int:
        return self.estimator.seed

    def modules(self, block: Block) -> Sequence[str]:
        return list(self.estimator.guides(block))

    def begin(self, block: Block) -> None:
        self._index, self._wanted, self._found = block.index, dict(self.estimator.guides(block)), {}

    def add(self, seen: Mapping[str, Seen], samples: Sequence[int]) -> None:
        for name, groups in self._wanted.items():
            if name not in seen:
                raise AptqError(f"{name} is not called by the model, so the loss has no gradient there.")
            means = seen[name].gradient.float().unflatten(-1, (groups, -1)).square().mean((0, -1))
            means = means.reshape(len(samples), -1, groups)  # some modules put samples and tokens in one dimension
            if name not in self._found:
                self._found[name] = means.new_zeros(self.num_samples, *means.shape[1:])
            self._found[name][list(samples)] = means

    def finish(self) -> None:
        write_tensors(self.guidance.path(self._index), self._found, what="gradients")
