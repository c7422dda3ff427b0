"""The plan of least predicted cost within a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from aptq.allocators.choices import Choices, check_budget, choices
from aptq.allocators.relaxation import relaxed
from aptq.api import Allocation, Option

_ENOUGH = 1e-6
"""Share of the cost: a plan that the bound proves to be so near to the optimum is taken as it is."""
_SECONDS = 2.0
"""After which HiGHS's best plan so far is taken; the relaxation's is within one step of the optimum anyway."""


@dataclass(frozen=True)
class Knapsack:
    """Minimise the sum of the layers' costs under the budget: a multiple-choice knapsack, solved to a millionth.

    Its linear relaxation is solved on the layers' convex hulls, which gives a plan and a bound at once. What the bound
    shows to be in no better plan is struck out, and HiGHS solves the small problem that remains.

    Options: ``bits`` to choose among; ``budget``, in average bits per weight or, with ``count="model"``, megabytes of
    the whole model; ``count``, what the budget counts ("code", "storage" or "model"); ``pin``, the bits of layers by a
    pattern of their names; ``group_sizes`` to choose among, those of the format where there are none.

    Source of the problem: Sinha and Zoltners, "The multiple-choice knapsack problem", 1979; for bits, HAWQ-V3 (ICML
    2021), section 3.4.
    """

    bits: tuple[int, ...] = (2, 3, 4, 8)
    budget: float = 3.5
    count: str = "code"
    pin: Mapping[str, int] = field(default_factory=dict)
    group_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_budget(self.bits, self.budget, self.count, self.pin, self.group_sizes)

    @property
    def needs_costs(self) -> bool:
        """Costs are what is minimised."""
        return True

    def bit_options(self) -> tuple[int, ...]:
        """Return the widths to choose among."""
        return self.bits

    def allocate(self, problem: Allocation) -> dict[str, Option]:
        """Return the plan of least cost.

        Raises:
            AptqError: the budget cannot be kept, or the costs give nothing to choose by.
        """
        table = choices(problem, self.budget, self.count, self.pin)
        return table.plan(solve(table))


def solve(table: Choices) -> NDArray[np.int64]:
    """Return the column of each row (``[layers]``) that costs least within the limit.

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
