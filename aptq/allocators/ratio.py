"""The paper's allocator: the most sensitive share R of the weights gets the high bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aptq.allocators.share import check_share, room
from aptq.api import Allocation, Option


@dataclass(frozen=True)
class Ratio:
    """Rank layers by score and give ``high`` bits to the top ``ratio`` of the *weights*, ``low`` to the rest.

    Average code bits are ``high * R + low * (1 - R)`` (APTQ, DAC 2024, eq. 18), never more: a layer that would carry
    the share over ``ratio`` gets the low bits, and the next ones in rank are tried. The score is the cost that the high
    bits save, per weight; under a metric that is blind to bits it is the cost itself.
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
        units = problem.units()
        scores = self._scores(problem, units, low, high) if self.needs_costs else [0.0] * len(units)
        plan = dict.fromkeys(problem.shapes, low)
        left = room(self.ratio, problem)
        for at in sorted(range(len(units)), key=lambda at: -scores[at]):
            size = sum(map(problem.num_weights, units[at]))
            if size <= left:
                plan.update(dict.fromkeys(units[at], high))
                left -= size
        return plan

    def _scores(self, problem: Allocation, units: Sequence[Sequence[str]], low: Option, high: Option) -> list[float]:
        costs, size = problem.costs, problem.num_weights
        if all(costs[name][low] == costs[name][high] for name in problem.shapes):
            saved = [sum(costs[name][low] * size(name) for name in unit) for unit in units]
        else:
            saved = [sum(costs[name][low] - costs[name][high] for name in unit) for unit in units]
        return [each / sum(map(size, unit)) for each, unit in zip(saved, units, strict=True)]
