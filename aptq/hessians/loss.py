"""The curvature of the model's loss: GuidedQuant's Hessian."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from aptq.api import AptqError, Block
from aptq.hessians.guidance import guidance_of, refuse_experts
from aptq.hessians.input_observer import pre_hooked
from aptq.hessians.weighted_inputs import WeightedLayers, WeightedObserver

LABELS = ("data", "model", "both")


@dataclass(frozen=True)
class Loss:
    """``H = sum_t s_t x_t x_t^T`` with ``s_t`` the mean square of the loss's gradient at a layer's output channels.

    The block-diagonal Fisher matrix of the cross entropy, one block an output channel, averaged over ``groups`` groups
    of consecutive channels; gradients of different tokens are taken to be independent. They are those of the
    full-precision model, the inputs ``x_t`` those of the quantized blocks before. Errors and traces of all layers are
    in the unit of the loss, nats per token.

    ``labels`` are what the loss compares predictions with: the next token of the text ("data": the empirical Fisher
    matrix, as published), one drawn from the prediction ("model": the Fisher matrix), or "both": their mean.

    Source: Kim et al., "GuidedQuant" (ICML 2025, arXiv 2505.07004).
    """

    groups: int = 4
    labels: str = "data"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise AptqError(f"hessian.groups={self.groups} is not allowed; use 1 or more.")
        if self.labels not in LABELS:
            raise AptqError(f"hessian.labels={self.labels!r} is not known; use one of {', '.join(LABELS)}.")

    def guides(self, block: Block) -> Mapping[str, int]:
        """Ask for the gradients at all layers; fewer groups where the channels do not divide.

        Raises:
            AptqError: the block is a mixture of experts, whose layers see other tokens than the block.
        """
        refuse_experts(block)
        return {name: math.gcd(self.groups, layer.shape[0]) for name, layer in block.layers.items()}

    @contextmanager
    def observe(self, block: Block, *, need_outputs: bool = True) -> Iterator[WeightedObserver]:
        """Hook every layer's input; raise ``AptqError`` where the block's gradients are not known."""
        del need_outputs  # nothing is gained by stopping at the last layer's input
        observer = WeightedObserver(block, self._weights(block))
        with pre_hooked(block.layers, observer.hook):
            yield observer

    @contextmanager
    def watch(self, block: Block) -> Iterator[WeightedLayers]:
        """Nothing is hooked; raise as ``observe`` does."""
        yield WeightedLayers(self._weights(block))

    def _weights(self, block: Block) -> Mapping[str, Tensor]:
        return guidance_of(block, block.layers)
