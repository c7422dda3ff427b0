"""GPTAQ: GPTQ towards the full-precision model's output (asymmetric calibration).

Source: Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration" (ICML 2025, arXiv
2504.02692), for the objective. The way to its minimum is another: see ``docs/quantizers.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aptq.api import AptqError, Curvature, Format, Option, Rounded
from aptq.quantizers.columns import check_loop, round_weight
from aptq.quantizers.factors import Damping, Feedback, factorize


@dataclass(frozen=True, eq=False)
class GPTAQFactors:
    """What GPTQ prepares, and where the drift moves its target."""

    feedback: Feedback
    shift: Tensor | None  # [heads, in, in]: drift (H + damping)^-1, in natural order; None where nothing drifted

    @property
    def damping(self) -> float:
        """That of the feedback."""
        return self.feedback.damping

    @property
    def events(self) -> tuple[str, ...]:
        """Those of the feedback."""
        return self.feedback.events


@dataclass(frozen=True)
class GPTAQ:
    """Minimise ``||W X_f - V X||^2`` over the rounded weight ``V``, ``X_f`` being the full-precision model's inputs.

    ``X`` are the inputs behind the layers that are rounded already. With the drift ``2 (X_f - X) X^T``, up to a
    constant the objective is ``||(W' - V) X||^2`` with the target ``W' = W (I + drift (H + damping)^-1)``, of which
    ``alpha`` takes a share: ``W' = W + alpha W drift (H + damping)^-1``. What follows is GPTQ of ``W'``, to which the
    format's grid is fitted as well. Without drift (in pass 1, in the first layers) it is GPTQ to the bit.

    The shift is a regression of small differences on the calibration text. The default of ``alpha`` is that of
    published code: in the trials of ``docs/quantizers.md``, with few tokens, the whole of the shift did harm.

    A layer's activations are held twice, and so are the hidden states of all samples: see ``docs/quantizers.md``.
    The options but ``alpha`` are those of GPTQ.
    """

    alpha: float = 0.25
    damping: float = 0.15
    damping_scale: str = "diagonal"
    max_damping: float = 1.0
    act_order: bool = True
    block_size: int = 32
    refine: int | None = None

    def __post_init__(self) -> None:
        check_loop(self.block_size, self.refine)
        self._damping()
        if not 0.0 < self.alpha <= 1.0:
            raise AptqError(
                f"quantizer.alpha={self.alpha} is not allowed; use more than 0 (that would be quantizer=gptq), up to 1."
            )

    @property
    def needs_drift(self) -> bool:
        """Yes."""
        return True

    @property
    def draft(self) -> GPTAQ:
        """The same without refinement; see ``aptq.api.DraftQuantizer``."""
        return replace(self, refine=0)

    def _damping(self) -> Damping:
        return Damping(self.damping, self.max_damping, self.damping_scale)

    def prepare(self, curvature: Curvature) -> GPTAQFactors:
        """Order, damp and factorize the column Hessians, and solve for the shift of the target."""
        feedback = factorize(curvature, self._damping(), self.act_order)
        return GPTAQFactors(feedback, None if curvature.drift is None else target_shift(curvature.drift, feedback))

    def quantize(self, weight: Tensor, factors: GPTAQFactors, format: Format, option: Option) -> Rounded:
        """Choose codes for a weight ``[out, in]``."""
        target = weight.float()
        if factors.shift is not None:
            by_head = target.reshape(factors.shift.shape[0], -1, target.shape[-1])
            target = torch.baddbmm(by_head, by_head, factors.shift, alpha=self.alpha).reshape(weight.shape)
        return round_weight(target, factors.feedback, format, option, block_size=self.block_size, refine=self.refine)


def target_shift(drift: Tensor, factors: Feedback) -> Tensor:
    """Return ``drift (H + damping)^-1`` for ``drift [heads, in, in]``, in natural order: ``W`` times it is the shift.

    ``(H + damping)^-1 = U^T U``, columns and rows in the order of the factors.
    """
    order = factors.order[:, None, :].expand_as(drift)
    half = drift.gather(2, order) @ factors.feedback.transpose(1, 2)
    half *= factors.diagonal.square()[:, None, :]
    return torch.empty_like(drift).scatter_(2, order, half @ factors.feedback)
