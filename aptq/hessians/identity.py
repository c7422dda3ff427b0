"""No curvature at all: every weight counts the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from aptq.api import Block, BlockInputs, CurvatureSum, Layer


@dataclass(frozen=True)
class Identity:
    """``H = 2 I``: the layer objective is ``||dW||^2``, and the calibration text has no say."""

    @contextmanager
    def observe(self, block: Block, *, need_outputs: bool = True) -> Iterator[IdentityObserver]:
        """Count tokens; nothing is hooked."""
        yield IdentityObserver(block, need_outputs)

    @contextmanager
    def watch(self, block: Block) -> Iterator[Identity]:
        """Nothing is hooked, and nothing remembered."""
        del block
        yield self

    def curvature_sum(self, layer: Layer, inputs: Sequence[Tensor], samples: Sequence[Sequence[int]]) -> CurvatureSum:
        """Return ``2 I`` for each token; see ``aptq.api.LayerObserver``."""
        del samples
        return _sum(layer, sum(x.numel() // x.shape[-1] for x in inputs))


def _sum(layer: Layer, tokens: int) -> CurvatureSum:
    matrix = 2.0 * tokens * torch.eye(layer.shape[1], device=layer.weight().device)
    return CurvatureSum(column=matrix[None], tokens=tokens)


class IdentityObserver:
    """Gives every layer ``2 I`` per token; layers of one width share it."""

    def __init__(self, block: Block, need_outputs: bool) -> None:
        self.block = block
        self.need_outputs = need_outputs
        self.tokens = 0

    def __call__(self, inputs: BlockInputs) -> Tensor | None:
        """Count tokens; run the block only for its outputs."""
        self.tokens += inputs.hidden.shape[0] * inputs.hidden.shape[1]
        return inputs.run(self.block.module) if self.need_outputs else None

    def sums(self) -> Mapping[str, CurvatureSum]:
        """Return ``2 tokens I`` for every layer."""
        shared: dict[int, CurvatureSum] = {}
        for layer in self.block.layers.values():
            width = layer.shape[1]
            if width not in shared:
                shared[width] = _sum(layer, self.tokens)
        return {name: shared[layer.shape[1]] for name, layer in self.block.layers.items()}
