"""What allocators with a budget have in common: the problem as arrays, its limit, its efficient steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from aptq.api import Allocation, AptqError, Option

_COUNTS = ("code", "storage", "model", "time")
_BITS_PER_MEGABYTE = 8_000_000
_NANOSECONDS = 1e9
_PER_MILLISECOND = 1_000_000
_Number = TypeVar("_Number", np.int64, np.float64)


@dataclass(frozen=True, eq=False, kw_only=True)
class Choices:
    """An allocation problem as arrays: one row a unit (a layer, or layers that share an option), one column an option.

    ``costs [units, options]``, infinite where an option is not allowed; ``sizes [units, options]`` in bits
    (in nanoseconds, where time is counted); ``limit`` is the largest sum of sizes that the budget allows.
    """

    units: Sequence[Sequence[str]]
    options: Sequence[Option]
    costs: NDArray[np.float64]
    sizes: NDArray[np.int64]
    limit: int

    def plan(self, chosen: NDArray[np.int64]) -> dict[str, Option]:
        """Return the option of each layer by name, from the column of its unit (``chosen [units]``)."""
        columns = chosen.tolist()
        return {name: self.options[column] for unit, column in zip(self.units, columns, strict=True) for name in unit}

    def cost(self, chosen: NDArray[np.int64]) -> float:
        """Return the sum of the costs of a choice ``[units]``."""
        return float(np.take_along_axis(self.costs, chosen[:, None], axis=1).sum())

    def size(self, chosen: NDArray[np.int64]) -> int:
        """Return the sum of the sizes of a choice ``[units]``."""
        return int(np.take_along_axis(self.sizes, chosen[:, None], axis=1).sum())


@dataclass(frozen=True)
class Budgeted:
    """What allocators with a budget share: their options, and what those make of a problem.

    ``bits`` to choose among; ``budget``, in average bits per weight or, with ``count="model"``, megabytes of the whole
    model, or, with ``count="time"``, milliseconds that all quantized layers take to decode a token; ``count``, what the
    budget counts ("code", "storage", "model" or "time"); ``pin``, the bits of layers by a pattern of
    their names; ``group_sizes`` to choose among, those of the format where there are none.
    """

    bits: tuple[int, ...] = (2, 3, 4, 8)
    budget: float = 3.5
    count: str = "code"
    pin: Mapping[str, int] | None = None
    group_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_budget(self.bits, self.budget, self.count, self.pin or {}, self.group_sizes)

    @property
    def needs_costs(self) -> bool:
        """Costs are what is minimised."""
        return True

    @property
    def needs_times(self) -> bool:
        """Where the budget counts time."""
        return self.count == "time"

    def bit_options(self) -> tuple[int, ...]:
        """Return the widths to choose among."""
        return self.bits

    def check_options(self, options: Sequence[Option]) -> None:
        """Raise ``AptqError`` where the budget cannot tell options apart that take different space."""
        if self.count == "code" and len({option.bits for option in options}) < len(options):
            raise AptqError(
                "With allocator.count=code, small groups and rich formats would cost nothing, since scales are not "
                "counted. Use allocator.count=storage, model or time to choose among several group sizes or formats."
            )

    def check_problem(self, problem: Allocation) -> None:
        """Raise ``AptqError`` where no plan is within the budget, whatever options cost."""
        check_feasible(problem, self.budget, self.count, self.pin or {})

    def choices(self, problem: Allocation) -> Choices:
        """Return the problem as arrays; see ``choices``."""
        return choices(problem, self.budget, self.count, self.pin or {})


def check_budget(
    bits: Sequence[int], budget: float, count: str, pin: Mapping[str, int], group_sizes: Sequence[int] = ()
) -> None:
    """Raise ``AptqError`` for options that contradict each other."""
    if not bits or len(set(bits)) != len(bits) or min(bits) < 1:
        raise AptqError(f"allocator.bits={list(bits)} is not allowed; name different widths, each from 1 up.")
    if count not in _COUNTS:
        raise AptqError(f"allocator.count={count!r} is not known; use one of {', '.join(_COUNTS)}.")
    if len(set(group_sizes)) != len(group_sizes) or any(size < 1 and size != -1 for size in group_sizes):
        raise AptqError(
            f"allocator.group_sizes={list(group_sizes)} is not allowed; name different sizes, each from 1 up or -1 "
            "for a whole row."
        )
    if not 0 < budget < float("inf"):
        raise AptqError(f"allocator.budget={budget} is not allowed; it is {_unit(count)}, above 0.")
    for pattern, width in pin.items():
        if width not in bits:
            raise AptqError(
                f"allocator.pin: {pattern!r} asks for {width} bits, which allocator.bits={list(bits)} does not offer."
            )


def choices(problem: Allocation, budget: float, count: str, pin: Mapping[str, int]) -> Choices:
    """Return a problem as arrays.

    Args:
        problem: layers, options, costs and sizes.
        budget: the limit; bits per weight (``count`` "code" or "storage"), megabytes of 10^6 bytes ("model") or
            milliseconds a token ("time").
        count: what the budget counts: codes alone; all that quantized layers store; all tensors of the model; the
            time that quantized layers take, one after the other.
        pin: bits of the layers whose name a pattern matches ("*" any characters); the first match counts.

    Raises:
        AptqError: nothing is within the budget, with the range that is and what it is owed to; a pattern matches no
            layer; a cost is no number.
    """
    units, options = problem.units(), list(problem.options)
    for name in problem.shapes:
        if not all(math.isfinite(problem.costs[name][option]) for option in options):
            raise AptqError(f"The metric's costs of {name} are {problem.costs[name]}; a plan needs numbers.")
    costs = _by_unit(problem, lambda name, option: problem.costs[name][option], np.float64)
    sizes = _sizes(problem, count)
    allowed = _allowed(units, options, pin)
    if not np.ptp(costs, axis=1).any() and len(options) > 1:
        raise AptqError(
            "The metric gives each layer the same cost at all bits, so that there is nothing to weigh against size. "
            "Use a metric that knows bits (metric=error), or allocator=ratio."
        )
    limit = _limit(problem, sizes, allowed, pin, budget=budget, count=count)
    return Choices(units=units, options=options, costs=np.where(allowed, costs, np.inf), sizes=sizes, limit=limit)


def check_feasible(problem: Allocation, budget: float, count: str, pin: Mapping[str, int]) -> None:
    """Raise ``AptqError`` where nothing is within the budget, with the range that is and what it is owed to, or where a
    pattern matches no layer; costs are not looked at."""
    allowed = _allowed(problem.units(), list(problem.options), pin)
    _limit(problem, _sizes(problem, count), allowed, pin, budget=budget, count=count)


def _limit(
    problem: Allocation,
    sizes: NDArray[np.int64],
    allowed: NDArray[np.bool_],
    pin: Mapping[str, int],
    *,
    budget: float,
    count: str,
) -> int:
    """Return what the budget leaves for the layers, in the unit of sizes; refuse one that no plan keeps."""
    unit, other = _scale(problem, count)
    smallest = np.where(allowed, sizes, np.iinfo(np.int64).max).min(axis=1).sum() + other
    limit = int(budget * unit * (1 + 1e-9))
    if smallest > limit:
        _refuse(len(problem.shapes), sizes, allowed, pin, other=other, unit=unit, budget=budget, count=count)
    return limit - other


def span(problem: Allocation, count: str, pin: Mapping[str, int]) -> tuple[float, float]:
    """Return what the smallest and the largest plan take, in the unit of budgets (see ``choices``)."""
    sizes, (unit, other) = _sizes(problem, count), _scale(problem, count)
    return _extremes(sizes, _allowed(problem.units(), list(problem.options), pin), unit, other)


def _extremes(sizes: NDArray[np.int64], allowed: NDArray[np.bool_], unit: int, other: int) -> tuple[float, float]:
    """Return the least and the largest sum of allowed sizes, in the unit of budgets."""
    least = np.where(allowed, sizes, np.iinfo(np.int64).max).min(axis=1).sum()
    return float((least + other) / unit), float((np.where(allowed, sizes, 0).max(axis=1).sum() + other) / unit)


def _scale(problem: Allocation, count: str) -> tuple[int, int]:
    """Return what one unit of a budget is in the unit of sizes, and what all plans take beside the layers."""
    unit = {"model": _BITS_PER_MEGABYTE, "time": _PER_MILLISECOND}.get(count, problem.total_weights)
    return unit, 8 * problem.other_bytes if count == "model" else 0


def _sizes(problem: Allocation, count: str) -> NDArray[np.int64]:
    """Return what is counted of each unit at each option, ``[units, options]``."""
    if count == "code":
        return _by_unit(problem, lambda name, option: problem.num_weights(name) * option.bits, np.int64)
    if count == "time":
        return _by_unit(problem, lambda name, option: round(problem.seconds[name][option] * _NANOSECONDS), np.int64)
    return stored_sizes(problem)


def stored_sizes(problem: Allocation) -> NDArray[np.int64]:
    """Return what each unit stores at each option, ``[units, options]``, in bits."""
    return _by_unit(problem, lambda name, option: problem.storage_bits[name][option], np.int64)


def _by_unit(problem: Allocation, figure: Callable[[str, Option], float], dtype: type[_Number]) -> NDArray[_Number]:
    """Return a figure of each layer at each option, added up over units: ``[units, options]``."""
    rows = [[sum(figure(name, option) for name in unit) for option in problem.options] for unit in problem.units()]
    return np.array(rows, dtype=dtype)


def _allowed(units: Sequence[Sequence[str]], options: Sequence[Option], pin: Mapping[str, int]) -> NDArray[np.bool_]:
    """Return ``[units, options]``: which options the pins leave."""
    widths = np.array([option.bits for option in options])
    allowed = np.ones((len(units), len(options)), dtype=bool)
    unused = set(pin)
    for row, unit in zip(allowed, units, strict=True):
        for name in unit:
            pattern = next((each for each in pin if fnmatchcase(name, each)), None)
            if pattern is not None:
                unused.discard(pattern)
                row &= widths == pin[pattern]
        if not row.any():
            raise AptqError(
                f"allocator.pin gives different bits to {', '.join(unit)}, which are stored as one. Give them the same."
            )
    if unused:
        name = units[0][0]
        raise AptqError(
            f"allocator.pin: no layer is left for {', '.join(map(repr, sorted(unused)))}; "
            f"a layer's name is for example {name!r}, and patterns match all of it ('*.{name.split('.')[-1]}')."
        )
    return allowed


def _refuse(
    layers: int,
    sizes: NDArray[np.int64],
    allowed: NDArray[np.bool_],
    pin: Mapping[str, int],
    *,
    other: int,
    unit: int,
    budget: float,
    count: str,
) -> None:
    """Raise the error of a budget that nothing is within; say what is, and what stands in the way."""

    low, high = _extremes(sizes, allowed, unit, other)
    free, _ = _extremes(sizes, np.ones_like(allowed), unit, other)
    blame = "" if free > budget or not pin else f" Without allocator.pin it could be had: from {free:.4g} on."
    if count == "model" and other > budget * unit:
        keys = "model.quantize_embeddings and model.quantize_head"
        blame = f" What is not among the layers takes {other / unit:.4g} of it (see {keys})."
    elif not blame:
        also = {"code": "", "time": ", or a faster backend"}
        larger = ", or larger groups (format.group_size), whose scales count too"
        blame = f" Offer fewer bits in allocator.bits{also.get(count, larger)}."
    raise AptqError(
        f"allocator.budget={budget:g} ({_unit(count)}) cannot be kept: these {layers} layers take between "
        f"{low:.4g} and {high:.4g}.{blame}"
    )


def _unit(count: str) -> str:
    return {
        "code": "average bits of codes per weight",
        "storage": "average stored bits per weight",
        "model": "megabytes of the whole model",
        "time": "milliseconds a token in the quantized layers",
    }[count]
