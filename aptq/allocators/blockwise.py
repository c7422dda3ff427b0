"""The paper's manual baseline: whole blocks at high or at low bits, by their depth alone."""

from __future__ import annotations

from dataclasses import dataclass

from aptq.allocators.share import check_share, room
from aptq.api import Allocation, AptqError, Option

_KEEP = ("first", "last", "alternating")


@dataclass(frozen=True)
class Blockwise:
    """Give all layers of a block ``high`` bits, or all of them ``low``; nothing is measured.

    As many blocks get the high bits as fit into the share ``ratio`` of the *weights*, never more: the ``first`` ones,
    the ``last`` ones, or ``alternating`` ones, which are spread over the depth as evenly as can be. Layers that are in
    no block (a head that is quantized) count among the weights and come after the blocks: each gets the high bits if
    the share still has room for it.

    Source: APTQ (DAC 2024), table 3, "manual block-wise"; the paper does not say which blocks it keeps.
    """

    ratio: float = 0.75
    high: int = 4
    low: int = 2
    keep: str = "first"

    def __post_init__(self) -> None:
        check_share(self.ratio, self.high, self.low)
        if self.keep not in _KEEP:
            raise AptqError(f"allocator.keep={self.keep!r} is not known; use one of {', '.join(_KEEP)}.")

    @property
    def needs_costs(self) -> bool:
        """Pass 1 is skipped."""
        return False

    def bit_options(self) -> tuple[int, ...]:
        """Return low and high bits."""
        return (self.low, self.high)

    def allocate(self, problem: Allocation) -> dict[str, Option]:
        """Keep as many blocks as have room, then the layers outside the blocks, in the order of the model."""
        by_bits = {option.bits: option for option in problem.options}
        plan = dict.fromkeys(problem.shapes, by_bits[self.low])
        blocks = problem.blocks()
        weights = [sum(map(problem.num_weights, block)) for block in blocks]
        left = room(self.ratio, problem)
        # Blocks may differ in size, and which ones are kept depends on their number: the largest number that fits.
        choices = (kept_blocks(count, len(blocks), self.keep) for count in range(len(blocks), -1, -1))
        kept = next(choice for choice in choices if sum(weights[index] for index in choice) <= left)
        left -= sum(weights[index] for index in kept)
        plan.update((name, by_bits[self.high]) for index in kept for name in blocks[index])
        inside = {name for block in blocks for name in block}
        for name in problem.shapes:
            if name not in inside and problem.num_weights(name) <= left:
                plan[name] = by_bits[self.high]
                left -= problem.num_weights(name)
        return plan


def kept_blocks(count: int, depth: int, keep: str) -> list[int]:
    """Return which ``count`` of ``depth`` blocks are kept, in order.

    Alternating ones are the middles of ``count`` equal parts of the depth: distances differ by one at most, and the
    two ends are treated alike but for rounding.
    """
    if keep == "alternating":
        return [(2 * part + 1) * depth // (2 * count) for part in range(count)]
    return list(range(count) if keep == "first" else range(depth - count, depth))
