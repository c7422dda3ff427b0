"""The plan of least predicted cost within a budget."""

from __future__ import annotations

from dataclasses import dataclass

from aptq.allocators.choices import Budgeted
from aptq.allocators.exact import solve
from aptq.api import Allocation, Option


@dataclass(frozen=True)
class Knapsack(Budgeted):
    """Minimise the sum of the layers' costs under the budget: a multiple-choice knapsack, solved to a millionth.

    Its linear relaxation is solved on the layers' convex hulls, which gives a plan and a bound at once. What the bound
    shows to be in no better plan is struck out, and HiGHS solves the small problem that remains. Options are those of
    ``Budgeted``.

    Source of the problem: Sinha and Zoltners, "The multiple-choice knapsack problem", 1979; for bits, HAWQ-V3 (ICML
    2021), section 3.4.
    """

    def allocate(self, problem: Allocation) -> dict[str, Option]:
        """Return the plan of least cost.

        Raises:
            AptqError: the budget cannot be kept, or the costs give nothing to choose by.
        """
        table = self.choices(problem)
        return table.plan(solve(table))
