"""FOEM: GPTQ that counts the first-order term of the loss at weights that compensation has moved.

Source: Zheng et al., "First-Order Error Matters: Accurate Compensation for Quantized Large Language Models" (AAAI 2026,
arXiv 2507.11017), with the update as it is in published code.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from aptq.api import AptqError, Curvature, Format, Option, Rounded
from aptq.quantizers.columns import check_loop, round_weight
from aptq.quantizers.factors import Damping, Feedback, factorize


@dataclass(frozen=True)
class FOEM:
    """GPTQ whose columns are drawn back to the weights of the original model, ``beta`` being the share of the way.

    A column ``w`` that waits to be rounded has been moved by the errors of those before it, away from what it was,
    ``v``. The gradient there is taken to be ``g = beta (w - v) H``, and the step that minimises
    ``g d^T + d H d^T / 2`` with ``d_j = q_j - w_j`` fixed is, with ``K = H^-1`` of what is left,

        ``d = -beta (w - v) - e_j K_j / K_jj``,   ``e_j = (w_j - q_j) - beta (w_j - v_j)``:

    the error that is fed back is less ``beta (w_j - v_j)``, and the columns to come are drawn back. The published code
    applies the second part to the next column only, just before it is rounded, and so does this. In a loop with
    feedback of unit diagonal it comes to two steps of linear interpolation from ``w_j`` to ``v_j``: one before rounding
    ``w_j``, one more before taking its error. ``beta = 0`` is GPTQ to the bit.

    What differs from the published code: the first column of each lazy block is drawn back as all others are (there the
    branch that would do it is never taken), group scales are static under activation order, and heads with a Hessian of
    their own are rounded side by side, as in ``quantizer=gptq``. The other options are those of GPTQ.

    Note that for the exact quadratic objective of GPTQ the gradient in the columns to come is zero after each
    compensation. What ``beta`` does is to trust that quadratic less, the further a column was moved.
    """

    beta: float = 0.2
    damping: float = 0.15
    damping_scale: str = "diagonal"
    max_damping: float = 1.0
    act_order: bool = True
    block_size: int = 32

    def __post_init__(self) -> None:
        check_loop(self.block_size)
        self._damping()
        if not 0.0 <= self.beta <= 1.0:
            raise AptqError(f"quantizer.beta={self.beta} is not allowed; use 0 (GPTQ) to 1.")

    def _damping(self) -> Damping:
        return Damping(self.damping, self.max_damping, self.damping_scale)

    def prepare(self, curvature: Curvature) -> Feedback:
        """Order, damp and factorize the column Hessians."""
        return factorize(curvature, self._damping(), self.act_order)

    def quantize(self, weight: Tensor, factors: Feedback, format: Format, option: Option) -> Rounded:
        """Choose codes for a weight ``[out, in]``."""
        return round_weight(weight, factors, format, option, block_size=self.block_size, pull=self.beta)
