"""Between a layer's weight and what is rounded and stored of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from aptq.api import Curvature, Format, Layer, Option, Transform


@dataclass(frozen=True)
class Coding:
    """A format, of weights in a transform's basis (``aptq.api.Transform``); None is the model's own basis."""

    format: Format
    transform: Transform | None = None

    def weight(self, layer: Layer) -> Tensor:
        """Return what is to be rounded of a layer: ``W T [out, in]``, float32."""
        weight = layer.weight().float()
        return weight if self.transform is None else self.transform.apply(weight)

    def stored(self, packed: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> Tensor:
        """Return the weight ``[out, in]``, float32, in the basis of storage, that packed tensors stand for."""
        return self.format.dequantize(self.format.unpack(packed, option, shape), option)

    def restored(self, packed: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> Tensor:
        """Return the same in the model's own basis."""
        stored = self.stored(packed, option, shape)
        return stored if self.transform is None else self.transform.invert(stored)


def turned(curvature: Curvature, transform: Transform | None) -> Curvature:
    """Return the curvature ``T^T H T`` that errors of ``W T`` are weighed with."""
    if transform is None:
        return curvature
    drift = curvature.drift
    return replace(
        curvature,
        column=_both_sides(transform, curvature.column),
        drift=None if drift is None else _both_sides(transform, drift),
    )


def _both_sides(transform: Transform, matrix: Tensor) -> Tensor:
    """Return ``T^T M T`` for ``M [heads, in, in]``."""
    return transform.apply(transform.apply(matrix).mT).mT
