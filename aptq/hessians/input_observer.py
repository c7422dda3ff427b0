"""Gram matrices of what layers are called with, collected while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from aptq.api import Block, BlockInputs, CurvatureSum, Layer
from aptq.hessians.gram import add_gram, drift_between, empty_sum, mirror


def add_inputs(total: CurvatureSum, x: Tensor) -> None:
    """Add ``2 x x^T`` for each token of ``x [..., in]``."""
    rows = x.detach().reshape(-1, x.shape[-1])
    add_gram(total.column[0], rows, 2.0)
    total.tokens += rows.shape[0]


class InputLayers:
    """``2 X^T X`` for each layer, once for layers that are called with the same tensors one after the other."""

    def __init__(self) -> None:
        self._seen: Sequence[Tensor] = ()
        self._total: CurvatureSum | None = None

    def curvature_sum(
        self,
        layer: Layer,
        inputs: Sequence[Tensor],
        samples: Sequence[Sequence[int]],
        full_precision: Sequence[Tensor] | None = None,
    ) -> CurvatureSum:
        """See ``aptq.api.DriftObserver``."""
        del samples
        seen = [*inputs, *(full_precision or ())]
        same = len(seen) == len(self._seen) > 0 and all(x is y for x, y in zip(seen, self._seen, strict=True))
        if self._total is None or not same:
            self._total = empty_sum(layer)
            for x in inputs:
                add_inputs(self._total, x)
            mirror(self._total.column)
            if full_precision is not None:
                self._total.drift = drift_between(inputs, full_precision, self._total.column[0])[None]
        self._seen = seen
        return self._total


@contextmanager
def pre_hooked(layers: Mapping[str, Layer], hook: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    """Have ``hook(name)`` called before each layer while the context lasts, however it ends."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.module.register_forward_pre_hook(hook(name)).remove)
        yield


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
            self._sums[name] = empty_sum(self.block.layers[name])
        add_inputs(self._sums[name], x)

    def __call__(self, inputs: BlockInputs) -> Tensor | None:
        """Run the block with the hooks on, to its end or to the last layer."""
        self._called.clear()
        try:
            outputs = inputs.run(self.block.module)
        except _Seen:
            return None
        finally:
            self._seen.clear()
        if not self.need_outputs and self._called and sorted(self._called) == sorted(self.block.layers):
            self._last = self._called[-1]
        return outputs

    def sums(self) -> Mapping[str, CurvatureSum]:
        """Return the sums; a layer that no token reached (an unused expert) has zeros."""
        for total in self._sums.values():
            mirror(total.column)
        return {name: self._sum(name) for name in self.block.layers}

    def _sum(self, name: str) -> CurvatureSum:
        return self._sums[self._leader[name]] if name in self._leader else empty_sum(self.block.layers[name])
