"""The factors that rounding with error feedback walks along: Hessians ordered, damped and inverted.

Source: Frantar et al., "GPTQ" (ICLR 2023), algorithm 1, in a form whose feedback has a unit diagonal; see
``aptq.quantizers.columns``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aptq.api import AptqError, Curvature

_SMALL = 256  # triangular matrices up to this size are inverted by substitution


@dataclass(frozen=True)
class Damping:
    """What is added to a Hessian's diagonal, and what happens where that is not enough.

    ``share`` of each entry itself (``scale: diagonal``, Marquardt's: no channel's damping depends on how large others
    are) or of their mean (``scale: mean``, GPTQ's: a few channels of huge activations damp all others). Where the
    Cholesky factorization fails the share is raised tenfold up to ``largest``; after that only the diagonal is used
    (round to nearest, in effect). Each step is reported.
    """

    share: float
    largest: float
    scale: str

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= self.largest:
            raise AptqError(
                f"quantizer.damping={self.share} is not allowed; use 0 <= damping <= max_damping={self.largest}."
            )
        if self.scale not in ("diagonal", "mean"):
            raise AptqError(f"quantizer.damping_scale={self.scale!r} is not known; use diagonal or mean.")

    def unit(self, diagonal: Tensor) -> Tensor:
        """Return what the share is taken of, for ``diagonal [heads, n]``."""
        return diagonal if self.scale == "diagonal" else diagonal.mean(1, keepdim=True).expand_as(diagonal)


@dataclass(frozen=True, eq=False)
class Feedback:
    """``U`` upper triangular with ``U^T U = (H + damping)^-1``, columns and rows in ``order``."""

    feedback: Tensor  # [heads, in, in]: U, each row divided by its diagonal entry
    diagonal: Tensor  # [heads, in]: of U
    order: Tensor  # [heads, in]: column at each position
    importance: Tensor  # [heads, in]: what an error costs when later columns have made up for it, in natural order
    hessian: Tensor  # [heads, in, in]: H without damping, in natural order
    ridge: Tensor  # [heads, in]: what is added to its diagonal
    damping: float  # as a share, see ``factorize``
    events: tuple[str, ...]

    def damped(self) -> Tensor:
        """Return ``H`` with damping ``[heads, in, in]``, positive definite, in natural order."""
        return self.hessian + torch.diag_embed(self.ridge)


@dataclass(frozen=True, eq=False)
class UnitFactor:
    """``U`` upper triangular with ``U^T U = (H + damping)^-1``, rows and columns in ``order``, in two parts."""

    feedback: Tensor  # [heads, n, n]: U, each row divided by its diagonal entry
    diagonal: Tensor  # [heads, n]: of U
    order: Tensor  # [heads, n]
    share: float  # of damping that was used
    events: tuple[str, ...]


def unit_factor(hessian: Tensor, damping: Damping, by_curvature: bool) -> UnitFactor:
    """Order, damp and factorize ``H [heads, n, n]``; ``by_curvature`` takes the largest diagonal entries first."""
    importance = hessian.diagonal(dim1=1, dim2=2)
    order = torch.argsort(importance, dim=1, descending=True, stable=True)
    if not by_curvature:
        order = torch.arange(order.shape[1], device=order.device).expand_as(order)
    # Last first, as the factorization wants it.
    ordered = torch.stack(
        [head.index_select(0, by).index_select(1, by) for head, by in zip(hessian, order.flip(1), strict=True)]
    )
    # What no token excites has no curvature: any unit will do, it only must not be singular.
    diagonal = ordered.diagonal(dim1=1, dim2=2)
    diagonal[diagonal <= 0] = 1.0
    lower, share, events = inverse_factor(ordered, damping)
    own = lower.diagonal(dim1=1, dim2=2).clone()
    lower /= own[:, :, None]
    return UnitFactor(lower.flip(1, 2), own.flip(1), order, share, events)


def factorize(curvature: Curvature, damping: Damping, act_order: bool) -> Feedback:
    """Order, damp and factorize the column Hessians; ``act_order`` takes columns by falling curvature."""
    factor = unit_factor(curvature.column, damping, act_order)
    importance = curvature.column.diagonal(dim1=1, dim2=2).clone()
    # The objective of the rounding loop is the sum of e_j^2 / U_jj^2: what grids should be fitted by (see LeanQuant,
    # ICLR 2025). What the calibration text never excites counts as a mean damping does.
    conditional = torch.empty_like(importance).scatter_(1, factor.order, factor.diagonal.square().reciprocal())
    idle = factor.share * importance.mean(1, keepdim=True).expand_as(importance)
    conditional = torch.where(importance > 0, conditional, idle)
    ridge = factor.share * damping.unit(importance)
    ridge = torch.where(importance + ridge > 0, ridge, torch.ones_like(ridge))
    return Feedback(
        feedback=factor.feedback,
        diagonal=factor.diagonal,
        order=factor.order,
        importance=conditional,
        hessian=curvature.column,
        ridge=ridge,
        damping=factor.share,
        events=factor.events,
    )


def inverse_factor(hessian: Tensor, damping: Damping) -> tuple[Tensor, float, tuple[str, ...]]:
    """Return lower triangular ``V`` with ``V^T V = (H + d)^-1`` for ``H [heads, n, n]``, the share used, and events.

    ``H + d = L L^T`` gives ``V = L^-1``: one factorization and one triangular inverse, and no explicit ``H^-1``. For
    the upper triangular factor that GPTQ walks along, give ``H`` with rows and columns in reverse, and reverse ``V``.
    The ladder of :class:`Damping` applies to all heads together. ``H`` is overwritten.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    bare = diagonal.clone()
    unit = damping.unit(bare)
    events: list[str] = []
    attempt = damping.share
    while True:
        diagonal.copy_(bare + attempt * unit)
        lower, info = torch.linalg.cholesky_ex(hessian)
        if not bool(info.any()) and bool(torch.isfinite(lower.diagonal(dim1=1, dim2=2)).all()):
            return invert_lower(lower), attempt, tuple(events)
        if attempt >= damping.largest:
            events.append(f"not positive definite with damping {attempt:g}: fell back to the diagonal")
            safe = diagonal.clamp(min=torch.finfo(hessian.dtype).tiny)
            return torch.diag_embed(safe.rsqrt()), attempt, tuple(events)
        attempt = min(max(10 * attempt, 1e-4), damping.largest)
        events.append(f"damping raised to {attempt:g}")


def invert_lower(lower: Tensor) -> Tensor:
    """Return the inverse of lower triangular matrices ``[heads, n, n]``.

    ``[[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]``: most of the work is in matrix products.
    """
    size = lower.shape[-1]
    if size <= _SMALL:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device).expand_as(lower)
        solved: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
        return solved
    half = size // 2
    first, second = invert_lower(lower[:, :half, :half]), invert_lower(lower[:, half:, half:])
    inverse = torch.zeros_like(lower, memory_format=torch.contiguous_format)
    inverse[:, :half, :half] = first
    inverse[:, half:, half:] = second
    inverse[:, half:, :half] = -(second @ (lower[:, half:, :half] @ first))
    return inverse
