"""The quadratic error of real rounding."""

from __future__ import annotations

from dataclasses import dataclass

from aptq.api import LayerStatistics, Option


@dataclass(frozen=True)
class Error:
    """Score a layer at an option by ``tr(dW H dW^T) / 2`` after rounding it with the run's quantizer and format.

    Second-order change of the estimator's objective (Nagel et al., "Up or Down?", ICML 2020, eq. 7, with the layer's
    Hessian). Absolute, not per weight: it is what a budget buys.
    """

    @property
    def needs_errors(self) -> bool:
        """Every layer is rounded at every option."""
        return True

    def cost(self, layer: LayerStatistics, option: Option) -> float:
        """Return the error, in units of the estimator's objective."""
        return layer.errors[option]
