"""The paper's allocator: the most sensitive share R of the weights gets the high bits."""

from __future__ import annotations

from dataclasses import dataclass

from aptq.allocators.share import check_share, room
from aptq.api import Allocation, Option


@dataclass(frozen=True)
class Ratio:
    """Rank layers by score and give ``high`` bits to the top ``ratio`` of the *weights*, ``low`` to the rest.

    Average code bits are ``high * R + low * (1 - R)`` (APTQ, DAC 2024, eq. 18), never more: a layer that would carry
    the share over ``ratio`` gets the low bits, and the next ones in rank are tried. The score is the cost that the high
    bits save, per weight; under a metric that is blind to bits (``trace``) it is the cost itself, as in the paper.
    """

    ratio: float = 0.75
    high: int = 4
    low: int = 2

    def __post_init__(self) -> None:
        check_share(self.ratio, self.high, self.low)

    @property
    def needs_costs(self) -> bool:
        """A ranking needs costs, unless there is nothing to rank."""
        return 0.0 < self.ratio < 1.0

    def bit_options(self) -> tuple[int, ...]:
        """Return low and high bits."""
        return (self.low, self.high)

    def allocate(self, problem: Allocation) -> dict[str, Option]:
        """Fill the high share in the order of falling score (ties in the order of the model)."""
        by_bits = {option.bits: option for option in problem.options}
        low, high = by_bits[self.low], by_bits[self.high]
        plan = dict.fromkeys(problem.shapes, low)
        left = room(self.ratio, problem)
        scores = self._scores(problem, low, high) if self.needs_costs else dict.fromkeys(plan, 0.0)
        for name in sorted(plan, key=lambda name: -scores[name]):
            if problem.num_weights(name) <= left:
                plan[name] = high
                left -= problem.num_weights(name)
        return plan

    def _scores(self, problem: Allocation, low: Option, high: Option) -> dict[str, float]:
        costs = problem.costs
        if all(costs[name][low] == costs[name][high] for name in problem.shapes):
            return {name: costs[name][low] for name in problem.shapes}
        return {name: (costs[name][low] - costs[name][high]) / problem.num_weights(name) for name in problem.shapes}
