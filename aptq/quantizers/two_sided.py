"""Rounding under a Hessian of rows and columns: GPTQ in both directions.

Source: derived from GPTQ (Frantar et al., ICLR 2023) for ``H = R (x) C``; what the row-by-row double loop of
BoA (Kim et al., ICML 2025) gives, along anti-diagonals.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aptq.api import AptqError, Curvature, EntryGrid, Format, Option, Rounded
from aptq.quantizers.columns import check_loop, round_weight
from aptq.quantizers.factors import Damping, Feedback, factorize, unit_factor


@dataclass(frozen=True, eq=False)
class TwoSidedFactors:
    """The factors of the columns and, where the curvature has rows, of the rows."""

    columns: Feedback
    rows: Tensor | None  # [heads, rows, rows]: V, rows and columns in ``row_order``
    row_order: Tensor | None  # [heads, rows]: row at each place
    damping: float
    events: tuple[str, ...]


@dataclass(frozen=True)
class TwoSided:
    """Minimise ``tr(R dW C dW^T)`` greedily, each rounding error made up for by later columns *and* later rows.

    With ``U^T U = C^-1`` and ``V^T V = R^-1`` (upper triangular, here with unit diagonals), the weight that is rounded
    at row ``r`` and column ``c`` is::

        T[r, c] = W[r, c] - sum_{r'<r} V[r', r] P[r', c] - sum_{c'<c} E[r, c'] U[c', c],    P = E U,    E = T - Q

    which depends on errors above and to the left alone, so that all ``(r, c)`` with the same ``r + c`` are rounded at
    once. ``act_order`` takes columns, and rows within their head, by falling curvature. Layers whose curvature has no
    rows are rounded as ``quantizer=gptq`` does with ``refine=0``; the options of that apply, with ``row_damping`` for
    the rows, and ``block_size`` columns are crossed before what follows them is updated.
    """

    damping: float = 0.15
    row_damping: float = 0.05
    damping_scale: str = "diagonal"
    max_damping: float = 1.0
    act_order: bool = True
    block_size: int = 128

    def __post_init__(self) -> None:
        if not 0.0 <= self.row_damping <= self.max_damping:
            raise AptqError(
                f"quantizer.row_damping={self.row_damping} is not allowed; "
                f"use 0 <= row_damping <= max_damping={self.max_damping}."
            )
        check_loop(self.block_size)
        self._damping()

    def _damping(self) -> Damping:
        return Damping(self.damping, self.max_damping, self.damping_scale)

    def prepare(self, curvature: Curvature) -> TwoSidedFactors:
        """Damp and factorize the Hessians of columns and rows."""
        columns = factorize(curvature, self._damping(), self.act_order)
        relative = curvature.relative_row()
        if relative is None:
            return TwoSidedFactors(columns, None, None, columns.damping, columns.events)
        rows = unit_factor(relative, replace(self._damping(), share=self.row_damping), self.act_order)
        events = columns.events + tuple(f"rows: {event}" for event in rows.events)
        return TwoSidedFactors(columns, rows.feedback, rows.order, columns.damping, events)

    def quantize(self, weight: Tensor, factors: TwoSidedFactors, format: Format, option: Option) -> Rounded:
        """Choose codes for a weight ``[out, in]``.

        Raises:
            AptqError: the format cannot round single weights, and the curvature has rows.
        """
        if factors.rows is None or factors.row_order is None:
            return round_weight(weight, factors.columns, format, option, block_size=self.block_size)
        order, row_order = factors.columns.order, factors.row_order
        by_head = weight.float().reshape(order.shape[0], -1, weight.shape[-1])
        grid = format.fit(by_head, option, factors.columns.importance)
        ordered = grid.permuted(order)
        if not isinstance(ordered, EntryGrid):
            raise AptqError(
                f"{type(format).__name__} codes several weights at once, and quantizer=two_sided rounds one at a time; "
                "use quantizer=gptq."
            )
        head = torch.arange(len(order), device=order.device)[:, None, None]
        places = (head, row_order[:, :, None], order[:, None, :])
        target = by_head[places]  # a copy: the loop writes to it
        crossed = round_both_ways(target, factors.rows, row_order, factors.columns.feedback, ordered, self.block_size)
        codes = torch.empty_like(crossed)
        codes[head, row_order[:, :, None], torch.arange(crossed.shape[2], device=order.device)] = crossed
        return Rounded(weight=ordered.finish(codes.transpose(1, 2)), grid=grid)


def round_both_ways(
    target: Tensor, rows: Tensor, row_order: Tensor, columns: Tensor, grid: EntryGrid, block_size: int
) -> Tensor:
    """Round ``target [heads, rows, in]`` (overwritten) with feedback in both directions; return the codes.

    Args:
        target: the weight, its columns in the order of ``grid``, its rows in ``row_order``.
        rows: ``V [heads, rows, rows]``, upper triangular with unit diagonal, in ``row_order``.
        row_order: ``[heads, rows]``: the grid's row at each place.
        columns: ``U [heads, in, in]``, likewise, in the order of ``grid``.
        grid: what is rounded to.
        block_size: columns that are crossed at once.
    """
    width, above = target.shape[2], rows.triu(1)
    codes = torch.empty_like(target)
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        block = _Block(target[:, :, start:stop], above, columns[:, start:stop, start:stop])
        codes[:, :, start:stop], errors = block.cross(grid, row_order, start)
        if stop < width:  # all rows' feedback at once
            target[:, :, stop:] -= rows.transpose(1, 2) @ (errors @ columns[:, start:stop, stop:])
    return codes


class _Block:
    """A run of columns on its way through ``round_both_ways``.

    Matrices are kept with their columns reversed and padded, ``[..., rows - 1 + columns + rows - 1]``: what lies on an
    anti-diagonal, one column further to the right with each row, is then the diagonal of a slice. Entries of the
    padding are computed along, and never used.
    """

    def __init__(self, target: Tensor, above: Tensor, columns: Tensor) -> None:
        self._rows, self._width = target.shape[1:]
        self._above = above
        self._target = self._padded(target)
        self._inside = slice(self._rows - 1, self._rows - 1 + self._width)
        # [heads, padded, columns], reversed both ways
        self._feedback = self._padded(columns.triu(1)).transpose(1, 2).flip(2).contiguous()
        self._errors, self._codes, self._sums = (torch.zeros_like(self._target) for _ in range(3))

    def _padded(self, matrix: Tensor) -> Tensor:
        return torch.nn.functional.pad(matrix.flip(2), (self._rows - 1, self._rows - 1))

    def _natural(self, padded: Tensor) -> Tensor:
        return padded[:, :, self._inside].flip(2)

    def cross(self, grid: EntryGrid, row_order: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Round the columns, the first of which is at ``start``; return codes and errors ``[heads, rows, columns]``."""
        row = torch.arange(self._rows, device=self._target.device).expand_as(row_order)
        inner = self._errors[:, :, self._inside]  # columns still reversed
        for diagonal in range(self._rows + self._width - 1):
            first = self._rows + self._width - 2 - diagonal  # of the slice whose diagonal this is
            here = slice(first, first + self._rows)
            left = (inner * self._feedback[:, here]).sum(2)  # sum_{c'<c} E[r, c'] U[c', c]
            upper = (self._above * self._sums[:, :, here]).sum(1)  # sum_{r'<r} V[r', r] P[r', c]
            wanted = self._entries(self._target, here) - left - upper
            position = (start + diagonal - row).clamp_(start, start + self._width - 1)
            code, value = grid.round_entries(wanted, row_order, position)
            error = wanted - value
            self._entries(self._codes, here).copy_(code)
            self._entries(self._errors, here).copy_(error)
            self._entries(self._sums, here).copy_(left + error)
        return self._natural(self._codes), self._natural(self._errors)

    @staticmethod
    def _entries(padded: Tensor, here: slice) -> Tensor:
        return padded[:, :, here].diagonal(dim1=1, dim2=2)
