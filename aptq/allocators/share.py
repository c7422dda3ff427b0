"""What allocators of two widths have in common: a share of the weights that gets the high bits."""

from __future__ import annotations

from aptq.api import Allocation, AptqError


def check_share(ratio: float, high: int, low: int) -> None:
    """Raise ``AptqError`` for a share that is none, or bits in the wrong order."""
    if not 0.0 <= ratio <= 1.0:
        raise AptqError(f"allocator.ratio={ratio} is not allowed; it is a share of the weights, from 0 to 1.")
    if low >= high:
        raise AptqError(f"allocator.low={low} must be below allocator.high={high}.")


def room(ratio: float, problem: Allocation) -> float:
    """Return how many weights may have the high bits, with a little more for how floats round."""
    return ratio * problem.total_weights * (1 + 1e-9)
