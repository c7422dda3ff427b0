"""The linear relaxation of a multiple-choice knapsack: steps along lower convex hulls, a plan and a bound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aptq.allocators.choices import Choices


@dataclass(frozen=True, eq=False, kw_only=True)
class Steps:
    """From the smallest choice upwards: each step moves one row to its next option, the best buys first.

    A row's steps are in the order of its hull, so every prefix of the list is a choice, and one that is optimal among
    all choices of its size (the Lagrangian relaxation's). ``price`` falls: cost saved per unit of size.
    """

    start: NDArray[np.int64]  # [rows]: column of each row before any step
    row: NDArray[np.int64]  # [steps]
    column: NDArray[np.int64]  # [steps]: where the step takes its row
    size: NDArray[np.int64]  # [steps]: what it adds
    saving: NDArray[np.float64]  # [steps]: what it takes off the cost, above 0

    @property
    def price(self) -> NDArray[np.float64]:
        """Cost saved per unit of size, ``[steps]``, falling."""
        return self.saving / self.size

    def after(self, count: int) -> NDArray[np.int64]:
        """Return the choice ``[rows]`` after the first ``count`` steps."""
        chosen = self.start.copy()
        chosen[self.row[:count]] = self.column[:count]  # of several steps of a row, the last one stays
        return chosen


def efficient_steps(costs: NDArray[np.float64], sizes: NDArray[np.int64]) -> Steps:
    """Return the steps along the lower convex hulls of all rows, sorted by price.

    Args:
        costs: ``[rows, options]``; infinite where an option is not allowed, one at least is finite in each row.
        sizes: ``[rows, options]``.
    """
    start = np.empty(len(costs), dtype=np.int64)
    found: list[tuple[int, int, int, float]] = []
    for index, (cost, bits) in enumerate(zip(costs.tolist(), sizes.tolist(), strict=True)):
        hull = _lower_hull(cost, bits)
        start[index] = hull[0]
        found.extend(
            (index, after, bits[after] - bits[before], cost[before] - cost[after])
            for before, after in zip(hull, hull[1:], strict=False)
        )
    found.sort(key=lambda step: -step[3] / step[2])
    row, column, size = (np.array([step[at] for step in found], dtype=np.int64) for at in range(3))
    saving = np.array([step[3] for step in found], dtype=np.float64)
    return Steps(start=start, row=row, column=column, size=size, saving=saving)


@dataclass(frozen=True, eq=False)
class Bound:
    """What the linear relaxation proves: no plan costs less than ``value``.

    A plan that takes option ``j`` in row ``i`` costs ``value + reduced[i, j]`` at least.
    """

    value: float
    reduced: NDArray[np.float64]


def relaxed(table: Choices) -> tuple[NDArray[np.int64], Bound]:
    """Return a plan from the linear relaxation, which wastes less than one step, and the bound."""
    steps = efficient_steps(table.costs, table.sizes)
    room = table.limit - table.size(steps.start)
    used = np.cumsum(steps.size)
    count = int(np.searchsorted(used, room, side="right"))
    chosen = steps.after(count)
    price = float(steps.price[count]) if count < len(steps.size) else 0.0
    relaxed_costs = table.costs + price * table.sizes
    least = relaxed_costs.min(axis=1)
    bound = Bound(value=float(least.sum()) - price * table.limit, reduced=relaxed_costs - least[:, None])
    left = table.limit - table.size(chosen)
    stopped = set()
    for at in range(count, len(steps.size)):  # smaller steps that still fit, each row's in order
        row = int(steps.row[at])
        if row not in stopped and steps.size[at] <= left:
            chosen[row] = steps.column[at]
            left -= int(steps.size[at])
        else:
            stopped.add(row)
    return chosen, bound


def _lower_hull(cost: list[float], size: list[int]) -> list[int]:
    """Return the columns on the lower convex hull of (size, cost), from the smallest size to the lowest cost."""
    hull: list[int] = []
    for column in sorted(
        (at for at, value in enumerate(cost) if value < float("inf")), key=lambda at: (size[at], cost[at])
    ):
        if hull and cost[column] >= cost[hull[-1]]:
            continue  # not smaller than one that costs no more
        while len(hull) > 1:
            first, middle = hull[-2], hull[-1]
            # The steps' prices as they will be sorted by, so that a row's own always come in order.
            if _price(cost, size, first, middle) > _price(cost, size, middle, column):
                break
            hull.pop()
        hull.append(column)
    return hull


def _price(cost: list[float], size: list[int], before: int, after: int) -> float:
    return (cost[before] - cost[after]) / (size[after] - size[before])
