"""Scales of groups fitted to codes that are chosen: by least squares, with nothing trained.

The weight of row ``r`` of head ``h`` is linear in its scales, ``V_jr = sum_p s_p[g(j), r] U_p[j, r]`` with ``g(j)`` the
group of input ``j`` and ``U`` what codes stand for at a scale of 1; a group has one part or (AFPQ) two. With the codes
fixed, ``J_r = (T - V)_r^T H (T - V)_r`` has its optimum where

    A s = b,    A_gk = sum_{i in g, j in k} U_ir H_ij U_jr,    b_g = sum_{i in g} U_ir (H T)_ir,

for each row by itself: as many unknowns as it has scales. (Ranges that are searched, before any code is chosen, go by
the diagonal of ``H`` and by one group at a time.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_RIDGE = 1e-6
"""Of the diagonal, towards the scales that there are: what nothing depends on stays."""
_AT_ONCE = 1 << 25
"""Entries of ``A`` that are held at a time."""


def tuned_scales(
    scales: Sequence[Tensor],
    parts: Sequence[Tensor],
    group: Tensor,
    target: Tensor,
    hessian: Tensor,
    stored: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Return scales with which no row loses more: of each the best ones for its codes, or those that it has.

    Args:
        scales: ``s [heads, groups, rows]``, positive, one for each part.
        parts: ``U [heads, in, rows]`` each.
        group: ``[heads, in]``, int64.
        target: ``T [heads, in, rows]``.
        hessian: ``H [heads, in, in]``, positive definite.
        stored: rounds scales to what is stored.
    """
    found = [torch.empty_like(scale) for scale in scales]
    for head in range(len(target)):
        unscaled = torch.stack([part[head] for part in parts])  # [parts, in, rows]
        begin = torch.stack([scale[head] for scale in scales])  # [parts, groups, rows]
        for each, best in zip(found, _optimum(unscaled, begin, group[head], target[head], hessian[head]), strict=True):
            each[head] = best
    possible = [torch.isfinite(each) & (each > 0) for each in found]
    new = [torch.where(*each) for each in zip(possible, map(stored, found), scales, strict=True)]
    better = _losses(new, parts, group, target, hessian) < _losses(scales, parts, group, target, hessian)
    return [torch.where(better[:, None], *each) for each in zip(new, scales, strict=True)]


def _optimum(unscaled: Tensor, begin: Tensor, group: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """Return the best scales ``[parts, groups, rows]`` of one head."""
    parts, groups, rows = begin.shape
    count = parts * groups
    wanted = _by_group(unscaled * (hessian @ target), group, groups).flatten(0, 1)  # b [parts groups, rows]
    chunk = max(1, _AT_ONCE // count**2)
    solved = [
        _solve(unscaled[..., at], begin[..., at].flatten(0, 1), wanted[:, at], group, hessian)
        for at in (slice(start, start + chunk) for start in range(0, rows, chunk))
    ]
    return torch.cat(solved, dim=1).view(parts, groups, rows)


def _solve(unscaled: Tensor, begin: Tensor, wanted: Tensor, group: Tensor, hessian: Tensor) -> Tensor:
    """Return ``s [parts groups, rows]`` of some rows."""
    parts, _, rows = unscaled.shape
    groups = len(begin) // parts
    matrix = unscaled.new_empty(rows, len(begin), len(begin), dtype=torch.float64)
    for part in range(parts):
        for number in range(groups):
            members = (group == number).nonzero()[:, 0]
            reached = hessian[:, members] @ unscaled[part, members]  # [in, rows]
            column = _by_group(unscaled * reached, group, groups).flatten(0, 1)
            matrix[:, :, part * groups + number] = column.T.double()
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    ridge = _RIDGE * diagonal + torch.finfo(torch.float64).tiny
    right = wanted.T.double() + ridge * begin.T.double()
    diagonal += ridge
    solved: Tensor = torch.linalg.solve_ex(matrix, right)[0]
    return solved.T.to(begin.dtype)


def _by_group(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Return the sums ``[parts, groups, rows]`` over the inputs of each group of ``values [parts, in, rows]``."""
    sums = values.new_zeros(values.shape[0], groups, values.shape[2])
    return sums.index_add_(1, group, values)


def _losses(
    scales: Sequence[Tensor], parts: Sequence[Tensor], group: Tensor, target: Tensor, hessian: Tensor
) -> Tensor:
    """Return ``J [heads, rows]``."""
    head = torch.arange(len(target), device=target.device)[:, None]
    left = target.clone()
    for scale, part in zip(scales, parts, strict=True):
        left -= scale[head, group] * part
    return (left * (hessian @ left)).sum(1)
