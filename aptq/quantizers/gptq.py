"""GPTQ: rounds column by column and lets the later columns make up for each error.

Source: Frantar et al., "GPTQ" (ICLR 2023), algorithm 1; static group scales with activation order as its authors'
``--act-order --static-groups``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from aptq.api import Curvature, Format, Option, Rounded
from aptq.quantizers.columns import check_loop, round_weight
from aptq.quantizers.factors import Damping, Feedback, factorize


@dataclass(frozen=True)
class GPTQ:
    """Minimise ``tr(dW H dW^T)`` greedily over columns, for all heads of a layer at once.

    ``damping`` is a share of each entry of the diagonal or, with ``damping_scale: mean``, as published, of their mean;
    where the Cholesky factorization fails it is raised tenfold up to ``max_damping``, after that only the diagonal is
    used (round to nearest, in effect), and each step is reported. ``act_order`` takes columns by falling curvature;
    group scales are fitted beforehand, so that the stored layout stays in natural order. ``block_size`` columns are
    updated at once (lazy batch updates). ``refine`` passes of coordinate descent follow, each of which rounds every
    column once more with all others as they are; None has it chosen (``round_weight``).
    """

    damping: float = 0.15
    damping_scale: str = "diagonal"
    max_damping: float = 1.0
    act_order: bool = True
    block_size: int = 32
    refine: int | None = None

    def __post_init__(self) -> None:
        check_loop(self.block_size, self.refine)
        self._damping()

    @property
    def draft(self) -> GPTQ:
        """The same without refinement; see ``aptq.api.DraftQuantizer``."""
        return replace(self, refine=0)

    def _damping(self) -> Damping:
        return Damping(self.damping, self.max_damping, self.damping_scale)

    def prepare(self, curvature: Curvature) -> Feedback:
        """Order, damp and factorize the column Hessians."""
        return factorize(curvature, self._damping(), self.act_order)

    def quantize(self, weight: Tensor, factors: Feedback, format: Format, option: Option) -> Rounded:
        """Choose codes for a weight ``[out, in]``."""
        return round_weight(weight, factors, format, option, block_size=self.block_size, refine=self.refine)
