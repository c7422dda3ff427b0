"""The curvature of each layer's own output: GPTQ's Hessian."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from aptq.api import Block
from aptq.hessians.input_observer import InputLayers, InputObserver, pre_hooked


@dataclass(frozen=True)
class Input:
    """``H = 2 sum_t x_t x_t^T`` over the layer's inputs ``x_t``: the Hessian of ``||dW X||^2`` for one output row.

    Source: Frantar et al., "GPTQ" (ICLR 2023), section 3. Layers that are fed the same tensor (q, k and v; gate and
    up) share one sum.
    """

    @property
    def gives_drift(self) -> bool:
        """Yes: ``2 sum_t (x_f - x) x^T`` takes no more than the inputs of both models."""
        return True

    @contextmanager
    def observe(self, block: Block, *, need_outputs: bool = True) -> Iterator[InputObserver]:
        """Hook every layer's input; the hooks return nothing, so activations stay as they are."""
        observer = InputObserver(block, need_outputs)
        with pre_hooked(block.layers, observer.hook):
            yield observer

    @contextmanager
    def watch(self, block: Block) -> Iterator[InputLayers]:
        """Nothing is hooked: what a layer is called with is given."""
        del block
        yield InputLayers()
