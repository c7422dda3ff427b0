"""The plan of least predicted cost within a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from aptq.allocators.choices import check_budget, choices
from aptq.allocators.exact import solve
from aptq.api import Allocation, Option


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
