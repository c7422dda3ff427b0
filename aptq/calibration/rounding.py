"""Rounding one layer, with the figures that tell how well it went, and handing the result to all ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from aptq.api import Curvature, DriftQuantizer, Factors, Format, Layer, Option, QuantizedWeight, Quantizer
from aptq.calibration.coding import Coding
from aptq.calibration.distribute import broadcast_tensors

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def needs_drift(quantizer: Quantizer) -> bool:
    """Say whether pass 2 has to compare each layer's inputs with the full-precision model's."""
    return isinstance(quantizer, DriftQuantizer) and quantizer.needs_drift


class Preparations:
    """What a quantizer prepared from each curvature: once for all layers that share it."""

    def __init__(self, quantizer: Quantizer) -> None:
        self._quantizer = quantizer
        self._held: list[tuple[Curvature, Factors]] = []

    def of(self, curvature: Curvature) -> tuple[Factors, bool]:
        """Return the factors, and whether they were made just now."""
        for held, factors in self._held:
            if held is curvature:
                return factors, False
        self._held.append((curvature, self._quantizer.prepare(curvature)))
        return self._held[-1][1], True

    def keep(self, curvatures: Collection[Curvature]) -> None:
        """Forget all other curvatures, and their factors."""
        self._held = [pair for pair in self._held if any(pair[0] is curvature for curvature in curvatures)]


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """A rounded layer. Errors are ``Curvature.quadratic`` of the weight difference, whatever the quantizer aimed at."""

    weight: QuantizedWeight
    error: float
    error_nearest: float
    signal: float  # Curvature.quadratic of the weight itself

    @property
    def relative_error(self) -> float:
        """The error as a share of the layer's own output energy."""
        return self.error / self.signal if self.signal > 0 else 0.0


def round_layer(
    weight: Tensor, curvature: Curvature, quantizer: Quantizer, factors: Factors, format: Format, option: Option
) -> Outcome:
    """Quantize ``weight [out, in]`` (float32) and measure it under the curvature, both in the basis of storage.

    ``error_nearest`` is that of nearest rounding on the same grid: what it is beyond ``error`` is the quantizer's gain.
    """
    rounded = quantizer.quantize(weight, factors, format, option)
    columns = weight.reshape(curvature.heads, -1, weight.shape[-1]).transpose(1, 2)
    nearest = rounded.grid.round(columns, slice(None))[1].transpose(1, 2).reshape(weight.shape)
    return Outcome(
        weight=rounded.weight,
        error=curvature.quadratic(weight - format.dequantize(rounded.weight, option)),
        error_nearest=curvature.quadratic(weight - nearest),
        signal=curvature.quadratic(weight),
    )


def share_layer(
    layer: Layer, packed: Mapping[str, Tensor] | None, owner: int, coding: Coding, option: Option, fabric: Fabric
) -> dict[str, Tensor]:
    """Put a layer's packed tensors, which its owner rank has, in place of its weight on all ranks; return them."""
    tensors = broadcast_tensors(packed, coding.format.packed_layout(option, layer.shape), owner, fabric)
    layer.set_weight(coding.restored(tensors, option, layer.shape))
    return tensors
