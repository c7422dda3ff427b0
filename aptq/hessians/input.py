"""The curvature of each layer's own output: GPTQ's Hessian."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aptq.api import Block, BlockInputs, CurvatureSum, Layer

_STRIP = 256  # rows of the Gram matrix computed at once; only its lower triangle of strips is


@dataclass(frozen=True)
class Input:
    """``H = 2 sum_t x_t x_t^T`` over the layer's inputs ``x_t``: the Hessian of ``||dW X||^2`` for one output row.

    Source: Frantar et al., "GPTQ" (ICLR 2023), section 3. Layers that are fed the same tensor (q, k and v; gate and
    up) share one sum.
    """

    @contextmanager
    def observe(self, block: Block, *, need_outputs: bool = True) -> Iterator[InputObserver]:
        """Hook every layer's input; the hooks return nothing, so activations stay as they are."""
        observer = InputObserver(block, need_outputs)
        handles = [layer.module.register_forward_pre_hook(observer.hook(name)) for name, layer in block.layers.items()]
        try:
            yield observer
        finally:
            for handle in handles:
                handle.remove()

    def curvature_sum(self, layer: Layer, inputs: Sequence[Tensor]) -> CurvatureSum:
        """Return ``2 X^T X`` for the rows of all inputs ``[..., in]``."""
        total = _empty(layer)
        for x in inputs:
            _add_gram(total, x.reshape(-1, x.shape[-1]))
        _mirror(total)
        return total


def _empty(layer: Layer) -> CurvatureSum:
    width = layer.shape[1]
    return CurvatureSum(column=torch.zeros(1, width, width, device=layer.weight().device), tokens=0)


def _add_gram(total: CurvatureSum, rows: Tensor) -> None:
    """Add ``2 x x^T`` for each of ``rows [tokens, width]``, in the lower triangle of strips only."""
    rows = rows.float()
    width = rows.shape[1]
    for start in range(0, width, _STRIP):
        stop = min(start + _STRIP, width)
        total.column[0, start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop], alpha=2)
    total.tokens += rows.shape[0]


def _mirror(total: CurvatureSum) -> None:
    """Copy the lower triangle to the upper one."""
    lower = total.column.tril_()
    lower += lower.tril(-1).transpose(1, 2)


class _Seen(Exception):
    """The last layer has seen its input."""


class InputObserver:
    """Adds ``2 x x^T`` once for each distinct input tensor of the block.

    Without need for outputs, a forward pass ends at the layer that is called last, before it multiplies. Which one
    that is shows in the first pass, if that calls every layer (an unused expert might come later another time).
    """

    def __init__(self, block: Block, need_outputs: bool) -> None:
        self.block = block
        self.need_outputs = need_outputs
        self._last: str | None = None  # where to stop
        self._called: list[str] = []  # layers of this forward, in order
        self._leader: dict[str, str] = {}  # layer -> the layer that is called first with the same input
        self._sums: dict[str, CurvatureSum] = {}  # by leader
        self._seen: list[tuple[Tensor, str]] = []  # inputs of this forward, kept alive so that identity means identity

    def hook(self, name: str):  # type: ignore[no-untyped-def]
        """Return the forward pre-hook of one layer."""

        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            self._called.append(name)
            leader = next((other for tensor, other in self._seen if tensor is args[0]), None)
            if leader is None:
                self._seen.append((args[0], name))
                self._add(name, args[0])
            elif self._leader.setdefault(name, leader) != leader:
                raise RuntimeError(f"{name} shared its input with {self._leader[name]} before and with {leader} now.")
            if name == self._last:
                raise _Seen

        return add

    def _add(self, name: str, x: Tensor) -> None:
        if self._leader.setdefault(name, name) != name:
            raise RuntimeError(f"{name} shared its input with {self._leader[name]} before and has its own now.")
        if name not in self._sums:
            self._sums[name] = _empty(self.block.layers[name])
        _add_gram(self._sums[name], x.detach().reshape(-1, x.shape[-1]))

    def __call__(self, inputs: BlockInputs) -> Tensor | None:
        """Run the block with the hooks on, to its end or to the last layer."""
        self._called.clear()
        try:
            outputs = inputs.run(self.block.module)
        except _Seen:
            return None
        finally:
            self._seen.clear()
        if not self.need_outputs and sorted(self._called) == sorted(self.block.layers):
            self._last = self._called[-1]
        return outputs

    def sums(self) -> Mapping[str, CurvatureSum]:
        """Return the sums; a layer that no token reached (an unused expert) has zeros."""
        for total in self._sums.values():
            _mirror(total)
        return {name: self._sum(name) for name in self.block.layers}

    def _sum(self, name: str) -> CurvatureSum:
        return self._sums[self._leader[name]] if name in self._leader else _empty(self.block.layers[name])
