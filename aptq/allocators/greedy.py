"""Bits to whom they help most, step by step."""

from __future__ import annotations

from dataclasses import dataclass

from aptq.allocators.choices import Budgeted
from aptq.allocators.relaxation import relaxed
from aptq.api import Allocation, Option


@dataclass(frozen=True)
class Greedy(Budgeted):
    """Begin with the smallest option everywhere and take the steps that save most cost per bit while they fit.

    Steps are those of each layer's lower convex hull of cost over size, so that every plan on the way is the best one
    of its size; only the last of the budget, less than a step, may be spent less than optimally. Options are those of
    ``Budgeted``; the plan differs from ``knapsack``'s in a few layers.

    Source: Fox, "Discrete optimization via marginal analysis", Management Science 13(3), 1966.
    """

    def allocate(self, problem: Allocation) -> dict[str, Option]:
        """Return the plan after the last step that fits.

        Raises:
            AptqError: the budget cannot be kept, or the costs give nothing to choose by.
        """
        table = self.choices(problem)
        return table.plan(relaxed(table)[0])
