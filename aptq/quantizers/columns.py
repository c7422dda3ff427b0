"""Rounding column by column with error feedback: what GPTQ and the quantizers built on it share.

Source: Frantar et al., "GPTQ" (ICLR 2023), algorithm 1, in a form whose feedback has a unit diagonal: with ``U`` upper
triangular and ``U^T U = (H + damping)^-1``, column ``k`` makes up for the error ``e`` of column ``j`` by
``w_k -= (U_jk / U_jj) e``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aptq.api import AptqError, Format, Grid, Option, RefitGrid, Rounded, TunedGrid
from aptq.quantizers.factors import Feedback

_PASSES = 3
"""Of refinement, unless told otherwise: more win a tenth as much again (docs/quantizers.md)."""


def check_loop(block_size: int, refine: int | None = 0) -> None:
    """Raise ``AptqError`` for options of the rounding loop that cannot be."""
    if block_size < 1:
        raise AptqError(f"quantizer.block_size={block_size} is not allowed; use a positive number of columns.")
    if refine is not None and refine < 0:
        raise AptqError(
            f"quantizer.refine={refine} is not allowed; use 0 (no passes) or more, or null to have it chosen."
        )


def round_weight(
    weight: Tensor,
    factors: Feedback,
    format: Format,
    option: Option,
    *,
    block_size: int,
    pull: float = 0.0,
    refine: int | None = 0,
) -> Rounded:
    """Round a weight ``[out, in]`` under a format, in the order of the factors; see ``round_columns``.

    The grid is fitted to ``weight`` beforehand and in the natural order of columns, so that what is stored knows
    nothing of the order. A grid that learns from a run (``aptq.api.RefitGrid``) gets more of them. ``refine`` passes of
    ``refine_columns`` follow (None: some, but for grids that learn, whose runs win as much), and then a grid may fit
    its parameters to the codes (``aptq.api.TunedGrid``).
    """
    by_head = weight.float().reshape(factors.order.shape[0], -1, weight.shape[-1])
    target = by_head.transpose(1, 2).contiguous()  # [heads, in, rows]
    grid = format.fit(by_head, option, factors.importance)
    best = run = _run(target, factors, grid, block_size, pull)
    while isinstance(run.grid, RefitGrid) and (refitted := run.grid.refit(run.met)) is not None:
        run = _run(target, factors, refitted, block_size, pull)
        best = run if run.objective < best.objective else best
    codes, grid = best.codes, best.grid
    passes = refine if refine is not None else 0 if isinstance(grid, RefitGrid) else _PASSES
    if passes:
        rounded = format.dequantize(grid.finish(codes), option)
        values = rounded.reshape(by_head.shape).transpose(1, 2).contiguous()
        codes = refine_columns(values, target, factors.damped(), grid, block_size, passes)
    if isinstance(grid, TunedGrid) and grid.tunes:
        grid = grid.tuned(codes, target, factors.damped())
    return Rounded(weight=grid.finish(codes), grid=grid)


@dataclass(frozen=True, eq=False)
class _Run:
    """What one run of the rounding loop came to."""

    codes: Tensor  # [heads, in, rows], in natural order, as all here
    grid: Grid
    met: Tensor  # [heads, in, rows]: what was rounded
    objective: float  # of the loop: the sum of (e_j / U_jj)^2


def _run(target: Tensor, factors: Feedback, grid: Grid, block_size: int, pull: float) -> _Run:
    """Round ``target [heads, in, rows]``, columns in natural order, on a grid."""
    head = torch.arange(target.shape[0], device=target.device)[:, None]
    columns = target[head, factors.order]  # a copy: the rounding loop writes to it
    learns = isinstance(grid, RefitGrid)
    met = torch.empty_like(columns) if learns else columns[:0]
    ordered = grid.permuted(factors.order)
    codes = round_columns(columns, factors.feedback, ordered, block_size, pull, met if learns else None)
    if not learns:
        return _Run(_natural(codes, factors.order), grid, met, 0.0)
    objective = (columns / factors.diagonal[:, :, None]).square().sum(dtype=torch.float64).item()
    return _Run(_natural(codes, factors.order), grid, _natural(met, factors.order), objective)


def _natural(columns: Tensor, order: Tensor) -> Tensor:
    """Return ``columns [heads, in, ...]``, which are in ``order [heads, in]``, in their own."""
    natural = torch.empty_like(columns)
    natural[torch.arange(len(columns), device=columns.device)[:, None], order] = columns
    return natural


def round_columns(
    columns: Tensor, feedback: Tensor, grid: Grid, block_size: int, pull: float = 0.0, met: Tensor | None = None
) -> Tensor:
    """Round ``columns [heads, in, rows]`` in order with error feedback; return the codes, and leave the errors behind.

    Every column after ``j`` is updated by ``w_k -= (U_jk / U_jj) e_j`` with ``e_j = w_j - q_j``: at once within a
    block, by one matrix product per block beyond it (lazy batch updates).

    ``pull`` in [0, 1] draws a column back to what it was at the beginning, by that share of the way: once before it is
    rounded, and once more before its error is taken (see ``aptq.quantizers.foem``). 0 is GPTQ. ``met``, where given, is
    filled with the columns as they were when they were rounded.
    """
    in_features = columns.shape[1]
    anchors = columns.clone().unbind(1) if pull else ()
    codes = []
    for start in range(0, in_features, block_size):
        stop = min(start + block_size, in_features)
        block, within = columns[:, start:stop], feedback[:, start:stop, start:stop]
        for j, column in enumerate(block.unbind(1)):
            if pull:
                column.lerp_(anchors[start + j], pull)
            if met is not None:
                met[:, start + j] = column
            code, value = grid.round(column, start + j)
            codes.append(code)
            if pull:
                column.lerp_(anchors[start + j], pull)
            column.sub_(value)  # the error takes the place of the column
            if j + 1 < stop - start:
                block[:, j + 1 :].baddbmm_(within[:, j, j + 1 :, None], column[:, None], alpha=-1)
        if stop < in_features:
            columns[:, stop:].baddbmm_(feedback[:, start:stop, stop:].transpose(1, 2), block, alpha=-1)
    return torch.stack(codes, dim=1)


def refine_columns(values: Tensor, target: Tensor, hessian: Tensor, grid: Grid, block_size: int, passes: int) -> Tensor:
    """Lower ``tr((T - V)^T H (T - V))`` by rounding one column after the other anew; return the codes.

    A column that alone may change has its optimum at ``v_j + (H (T - V))_j / H_jj``, and the level nearest to that is
    the best there is: no step raises the objective. Each pass goes once over all columns.

    Source: cyclic coordinate descent, as in QuantEase (Behdin et al., arXiv 2309.01885), started from GPTQ's result.

    Args:
        values: ``V [heads, in, rows]`` (overwritten), levels of the grid.
        target: ``T [heads, in, rows]``.
        hessian: ``H [heads, in, in]``, of positive diagonal.
        grid: what is rounded to.
        block_size: columns that are updated at once.
        passes: at least 1.
    """
    gradient = hessian @ (target - values)
    diagonal = hessian.diagonal(dim1=1, dim2=2)[:, :, None]
    codes = [torch.empty(0)] * values.shape[1]
    for _ in range(passes):
        for start in range(0, values.shape[1], block_size):
            here = slice(start, min(start + block_size, values.shape[1]))
            before, own = values[:, here].clone(), gradient[:, here].clone()
            for j, column in enumerate(values[:, here].unbind(1)):
                position = start + j
                codes[position], value = grid.round(column + own[:, j] / diagonal[:, position], position)
                own.baddbmm_(hessian[:, here, position, None], (value - column)[:, None], alpha=-1)
                column.copy_(value)
            gradient.baddbmm_(hessian[:, :, here], values[:, here] - before, alpha=-1)
    return torch.stack(codes, dim=1)
