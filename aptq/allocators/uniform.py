"""The same bits everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from aptq.api import Allocation, Option


@dataclass(frozen=True)
class Uniform:
    """Give every layer ``bits``; no statistics are needed."""

    bits: int = 4

    @property
    def needs_costs(self) -> bool:
        """Pass 1 is skipped."""
        return False

    def bit_options(self) -> tuple[int, ...]:
        """Return the one width."""
        return (self.bits,)

    def allocate(self, problem: Allocation) -> dict[str, Option]:
        """Return the one option for every layer."""
        (option,) = problem.options
        return dict.fromkeys(problem.shapes, option)
