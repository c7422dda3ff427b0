"""Rounding one layer, with the figures that tell how well it went."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from aptq.api import Curvature, Factors, Format, Option, QuantizedWeight, Quantizer


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """A rounded layer. Errors are ``Curvature.quadratic`` of the weight difference."""

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
    """Quantize ``weight [out, in]`` (float32) and measure it under the curvature."""
    quantized = quantizer.quantize(weight, factors, format, option)
    return Outcome(
        weight=quantized,
        error=curvature.quadratic(weight - format.dequantize(quantized, option)),
        error_nearest=curvature.quadratic(weight - nearest(weight, curvature.heads, format, option)),
        signal=curvature.quadratic(weight),
    )


def nearest(weight: Tensor, heads: int, format: Format, option: Option) -> Tensor:
    """Return ``weight [out, in]`` with every entry at the nearest level of the format's grid."""
    by_head = weight.reshape(heads, -1, weight.shape[-1])
    _, values = format.fit(by_head, option).round(by_head.transpose(1, 2), slice(None))
    return values.transpose(1, 2).reshape(weight.shape)
