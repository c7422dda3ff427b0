"""Times of calls that are to be compared: in turn, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor

Call = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds a call takes: the median of all rounds, the best one, and the middle half."""

    median: float
    best: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarize the rounds' means."""
        low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
        return cls(median=median, best=min(seconds), low=low, high=high)


def time_in_turn(
    contenders: Mapping[str, Sequence[Call]], rounds: int, seconds: float, device: torch.device
) -> dict[str, Timing]:
    """Time every contender once a round, each for at least ``seconds``, going through its calls again and again.

    The first calls of a turn are not timed: threads that the one before left spinning are asleep by then.
    """
    calls = {name: cycle(each) for name, each in contenders.items()}
    counts = {}
    with torch.inference_mode():
        for name, each in calls.items():
            _timed(each, 2, device)
            counts[name] = max(1, round(seconds / max(_timed(each, 3, device), 1e-7)))
        found: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, each in calls.items():
                _timed(each, max(1, counts[name] // 4), device)
                found[name].append(_timed(each, counts[name], device))
    return {name: Timing.of(each) for name, each in found.items()}


def _timed(calls: cycle[Call], count: int, device: torch.device) -> float:
    """Return the mean seconds of the next ``count`` calls."""
    taken = list(islice(calls, count))
    _finish(device)
    started = time.perf_counter()
    for call in taken:
        call()
    _finish(device)
    return (time.perf_counter() - started) / count


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes a second that copying a large tensor reads and writes, the best of some."""
    source = torch.ones(64 << 20, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    call: Call = lambda: target.copy_(source)  # noqa: E731
    best = min(_timed(cycle([call]), 1, device) for _ in range(6))
    return 2 * source.nbytes / best
