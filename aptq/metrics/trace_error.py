"""Average trace times squared rounding error, HAWQ-V2's metric."""

from __future__ import annotations

from dataclasses import dataclass

from aptq.api import LayerStatistics, Option


@dataclass(frozen=True)
class TraceError:
    """Score a layer at an option by ``tr(H) / (out * in) * ||dW||^2 / 2``, rounded by the run's quantizer and format.

    The second-order change of the estimator's objective if the rounding error had no preferred direction, which
    nearest rounding comes near to; GPTQ's errors avoid the steep directions, and ``metric=error`` sees that.

    Source: Dong et al., "HAWQ-V2" (NeurIPS 2020, arXiv 1911.03852), equation 7, with the half of the Taylor series.
    """

    @property
    def needs_errors(self) -> bool:
        """Every layer is rounded at every option."""
        return True

    def cost(self, layer: LayerStatistics, option: Option) -> float:
        """Return the expected error, in units of the estimator's objective."""
        return layer.trace / layer.num_weights * layer.distances[option] / 2
