"""Rounding one layer, with the figures that tell how well it went."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from aptq.api import Curvature, DriftQuantizer, Factors, Format, Option, QuantizedWeight, Quantizer


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
    """Quantize ``weight [out, in]`` (float32) and measure it under the curvature.

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
