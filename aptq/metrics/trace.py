"""Average Hessian trace, the paper's sensitivity metric."""

from __future__ import annotations

from dataclasses import dataclass

from aptq.api import LayerStatistics, Option


@dataclass(frozen=True)
class Trace:
    """Score a layer at ``b`` bits by ``4^-b tr(H)``: how sharply the objective bends, for the noise of a width.

    Weights of all layers are taken to be rounded in ranges of the same size, so that each bit more quarters the mean
    square of what is rounded off (Bennett, "Spectra of quantized signals", 1948). ``allocator=ratio`` ranks by what the
    high bits save a weight, which is the average trace ``tr(H) / (out * in)`` times a constant: the paper's ranking.

    Source: APTQ (DAC 2024), section 3.3 and algorithm 1, step 2, for the average trace; the factor is ours.
    """

    @property
    def needs_errors(self) -> bool:
        """No layer is rounded."""
        return False

    def cost(self, layer: LayerStatistics, option: Option) -> float:
        """Return the cost, in units of the estimator's objective per squared range of a weight."""
        return layer.trace * 4.0**-option.bits
