"""Average Hessian trace, the paper's sensitivity metric."""

from __future__ import annotations

from dataclasses import dataclass

from aptq.api import LayerStatistics, Option


@dataclass(frozen=True)
class Trace:
    """Score a layer by ``tr(H) / (out * in)``: how sharply the objective bends, per weight.

    Blind to the option: a layer scores the same at 2 and at 4 bits, so only ranking allocators (``ratio``) can use it.
    Source: APTQ (DAC 2024), section 3.3 and algorithm 1, step 2.
    """

    @property
    def needs_errors(self) -> bool:
        """No layer is rounded."""
        return False

    def cost(self, layer: LayerStatistics, option: Option) -> float:
        """Return the average trace, in units of the estimator's objective per squared weight."""
        del option
        return layer.trace / layer.num_weights
