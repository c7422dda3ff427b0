"""The choice of least cost within a limit, with a proof of how near it is to the optimum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from aptq.allocators.choices import Choices
from aptq.allocators.relaxation import relaxed

_ENOUGH = 1e-6
"""Share of the cost: a plan that the bound proves to be so near to the optimum is taken as it is."""
_SECONDS = 2.0
"""After which HiGHS's best plan so far is taken; the relaxation's is within one step of the optimum anyway."""


def solve(table: Choices) -> NDArray[np.int64]:
    """Return the column of each row (``[units]``) that costs least within the limit.

    Least but for a millionth: of the cost where the bound proves as much, else of the largest difference that is left
    to HiGHS to decide.
    """
    allowed = np.isfinite(table.costs)
    chosen, bound = relaxed(table)
    gap = table.cost(chosen) - bound.value
    # Struck out: taking it would cost more than the plan at hand even if all else were relaxed.
    allowed &= (bound.reduced <= gap * (1 + 1e-9)) | (np.arange(table.costs.shape[1]) == chosen[:, None])
    free = np.flatnonzero(allowed.sum(axis=1) > 1)
    if gap <= _ENOUGH * abs(bound.value) or not len(free):
        return chosen
    fixed = table.size(chosen) - int(np.take_along_axis(table.sizes[free], chosen[free, None], axis=1).sum())
    better = chosen.copy()
    found = _milp(table.costs[free], table.sizes[free], allowed[free], table.limit - fixed)
    if found is None:
        return chosen
    better[free] = found
    return better if table.size(better) <= table.limit and table.cost(better) < table.cost(chosen) else chosen


def _milp(
    costs: NDArray[np.float64], sizes: NDArray[np.int64], allowed: NDArray[np.bool_], limit: int
) -> NDArray[np.int64] | None:
    """Solve the problem ``[rows, options]`` over the allowed entries by HiGHS; None if it found nothing in time."""
    rows, columns = np.nonzero(allowed)
    cost = costs[rows, columns] - costs.min(axis=1)[rows]
    size = sizes[rows, columns].astype(np.float64)
    one_each = csr_matrix((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(len(costs), len(rows)))
    # HiGHS lets a constraint be off by 1e-6: scaled so that this is less than half a bit, where sizes allow it at all.
    unit = max(1.0, float(size.max()) / 1e6)
    result = milp(
        cost / (cost.max() or 1.0),
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size[None] / unit, -np.inf, limit / unit)],
        options={"mip_rel_gap": 0.0, "time_limit": _SECONDS},
    )
    if result.x is None:
        return None
    chosen = np.empty(len(costs), dtype=np.int64)
    picked = result.x > 0.5
    chosen[rows[picked]] = columns[picked]
    return chosen
