"""All budgets at once: the best plan for each, and one of them by its size or by what it may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from aptq.allocators.choices import Budgeted, Choices, choices, span
from aptq.allocators.exact import solve
from aptq.api import Allocation, AptqError, Option

_MOST_PLANS = 200
_FINE = 1 << 40
"""Parts that the largest cost is counted in where costs are the limit."""


@dataclass(frozen=True)
class Pareto(Budgeted):
    """The plans of least predicted cost at budgets ``step`` apart, from one pass of statistics.

    The run goes on with one of them: the plan at ``budget``, or with ``max_cost`` the smallest plan that is predicted
    to cost no more (nats per token, with the default metric). All are kept in the run folder's ``plans/``.
    ``step`` is in the unit of ``count``. The other options are those of ``Budgeted``.

    The smallest plan within a cost is the same multiple-choice knapsack with size and cost exchanged, and solved alike.
    """

    step: float = 0.25
    max_cost: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.step < math.inf:
            raise AptqError(f"allocator.step={self.step} is not allowed; it is a distance of budgets, above 0.")
        if self.max_cost is not None and not 0 < self.max_cost < math.inf:
            raise AptqError(
                f"allocator.max_cost={self.max_cost} is not allowed; it is a cost above 0 in the metric's unit, or "
                "null to go by allocator.budget."
            )

    def check_problem(self, problem: Allocation) -> None:
        """Raise ``AptqError`` where no plan is within the budget, unless ``max_cost`` decides."""
        if self.max_cost is None:
            super().check_problem(problem)

    def allocate(self, problem: Allocation) -> dict[str, Option]:
        """Return the plan at the budget, or the smallest one within ``max_cost``.

        Raises:
            AptqError: neither can be kept, with the range that can; or the costs give nothing to choose by.
        """
        if self.max_cost is None:
            table = self.choices(problem)
            return table.plan(solve(table))
        _, largest = span(problem, self.count, self.pin or {})
        table = choices(problem, largest * (1 + 1e-9), self.count, self.pin or {})
        return table.plan(solve(_exchanged(table, self.max_cost)))

    def front(self, problem: Allocation) -> dict[str, dict[str, Option]]:
        """Return the plan of least cost at each budget that is a multiple of ``step``, by the budget in words.

        Raises:
            AptqError: the step is so small that there would be hundreds of them.
        """
        low, high = span(problem, self.count, self.pin or {})
        first, last = math.ceil(low / self.step * (1 - 1e-9)), math.floor(high / self.step * (1 + 1e-9))
        if last - first >= _MOST_PLANS:
            least = (high - low) / _MOST_PLANS
            raise AptqError(
                f"allocator.step={self.step:g} makes {last - first + 1} plans between {low:.4g} and {high:.4g}; use "
                f"{least:.2g} or more."
            )
        tables = {
            f"{number * self.step:g}": choices(problem, number * self.step, self.count, self.pin or {})
            for number in range(first, last + 1)
        }
        return {budget: table.plan(solve(table)) for budget, table in tables.items()}


def _exchanged(table: Choices, max_cost: float) -> Choices:
    """Return the problem of the least size within a cost: sizes are minimised, and costs the limit, rounded upwards.

    Raises:
        AptqError: no plan costs so little.
    """
    allowed = np.isfinite(table.costs)
    finite = np.where(allowed, table.costs, 0)
    least = float(table.costs.min(axis=1).sum())
    if least > max_cost:
        smallest = np.where(allowed, table.sizes, np.iinfo(np.int64).max).argmin(axis=1)
        raise AptqError(
            f"allocator.max_cost={max_cost:g} cannot be kept: these layers are predicted to cost between {least:.4g} "
            f"and {table.cost(smallest):.4g}. Offer more bits in allocator.bits, or allow more."
        )
    unit = max(float(finite.max()), max_cost) / _FINE
    return replace(
        table,
        costs=np.where(allowed, table.sizes, np.inf),
        sizes=np.ceil(finite / unit).astype(np.int64),
        limit=int(max_cost / unit),
    )
