"""Bits to whom they help most, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from aptq.allocators.choices import check_budget, choices
from aptq.allocators.relaxation import relaxed
from aptq.api import Allocation, Option


@dataclass(frozen=True)
class Greedy:
    """Begin with the smallest option everywhere and take the steps that save most cost per bit while they fit.

    Steps are those of each layer's lower convex hull of cost over size, so that every plan on the way is the best one
    of its size; only the last of the budget, less than a step, may be spent less than optimally. Options as in
    ``knapsack``, whose plan differs in a few layers.

    Source: Fox, "Discrete optimization via marginal analysis", Management Science 13(3), 1966.
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
        """Costs are what the steps save."""
        return True

    def bit_options(self) -> tuple[int, ...]:
        """Return the widths to choose among."""
        return self.bits

    def allocate(self, problem: Allocation) -> dict[str, Option]:
        """Return the plan after the last step that fits.

        Raises:
            AptqError: the budget cannot be kept, or the costs give nothing to choose by.
        """
        table = choices(problem, self.budget, self.count, self.pin)
        return table.plan(relaxed(table)[0])
