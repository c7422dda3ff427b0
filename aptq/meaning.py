"""What the codes of a format mean, asked of the format itself: whoever can read such codes serves any such format."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar, cast

import torch
from torch import Tensor

from aptq import packing
from aptq.api import Format, Option
from aptq.codebook_meaning import Blocks, Vectors, blocks_of, codebooks_of, vectors_of
from aptq.probe import SCALES, dequantized, levels_under_bytes

_BELOW = (0.25, 1.0, 8.0)
_Told = TypeVar("_Told")

__all__ = [
    "MOST_STATE_BITS",
    "Blocks",
    "Integers",
    "Levels",
    "Meaning",
    "States",
    "Vectors",
    "codebooks_of",
    "meaning_of",
]

MOST_STATE_BITS = 12
"""Bits of the largest states that are recognized."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Integers:
    """``w = (code - zero) * scale``; without stored zeros each is ``2^(bits - 1)``."""

    stored_zeros: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class Levels:
    """``w = level[code] * scale``, with a scale of its own (``scales_below``) for levels below 0 where there is one."""

    levels: Tensor  # float32 [2^bits]; 0 for codes that the format has not
    two_sided: bool
    scale_values: Tensor | None = None  # float32 [256]: see ``Blocks``; None: scales are floats


@dataclass(frozen=True, eq=False, kw_only=True)
class States:
    """``w = value[state] * scale``: a state is the last bits of the codes of all outputs up to this one, of one input.

    The code of the output itself is lowest, and before the first output all codes are 0.
    """

    values: Tensor  # float32 [2^bits], bits up to MOST_STATE_BITS

    @property
    def bits(self) -> int:
        """Of a state."""
        return len(self.values).bit_length() - 1


Meaning = Integers | Levels | States | Blocks | Vectors


def meaning_of(format: Format, option: Option) -> Meaning | None:
    """Return what codes of a width mean in a format, or None when it is none of these.

    The format is given three outputs with every code in turn, scales that differ, and zeros that differ; and then, for
    states, more outputs in which every state is met. What was found is remembered: a model has many layers of a kind.
    """
    option = replace(option, group_size=-1)
    try:
        hash(format)
    except TypeError:  # such as one that holds others in a dict
        return _found(format, option)
    return _remembered(cast(Hashable, format), option)


@lru_cache(maxsize=64)
def _remembered(format: Hashable, option: Option) -> Meaning | None:
    return _found(cast("Format", format), option)


def _found(format: Format, option: Option) -> Meaning | None:
    count = 1 << option.bits
    layout = format.packed_layout(option, (len(SCALES), count))
    names = set(layout)
    if "codebook" in names:
        return vectors_of(format, option)
    if "codebooks" in names:
        return blocks_of(format, option, layout)
    if layout.get("scales", (None, None))[1] == torch.uint8:
        return _levels_of_bytes(format, option, names)
    if names == {"qweight", "scales", "qzeros"}:
        zeros = torch.tensor([0, count // 2, count - 1])
        values = _values(format, option, count, {"qzeros": packing.pack(zeros[None], option.bits)})
        expected = torch.arange(count) - zeros[:, None]
        return Integers(stored_zeros=True) if _agree(values, expected.float()) else None
    two_sided = names == {"qweight", "scales", "scales_below"}
    if not two_sided and names != {"qweight", "scales"}:
        return None
    below = {"scales_below": torch.tensor([_BELOW])} if two_sided else {}
    values = _of_most_codes(count, lambda most: _values(format, option, most, below))
    if values is None:
        return None
    levels = values[0] / (torch.where(values[0] < 0, _BELOW[0], 1.0) if two_sided else 1.0)
    if two_sided and not torch.equal(
        values, levels * torch.where(levels < 0, torch.tensor(_BELOW)[:, None], torch.tensor(SCALES)[:, None])
    ):
        return None
    if not two_sided and not _agree(values, levels.expand(len(SCALES), -1)):
        return _states_of(format, option)
    if not two_sided and torch.equal(levels, torch.arange(1 << option.bits) - float(1 << (option.bits - 1))):
        return Integers(stored_zeros=False)
    return Levels(levels=_filled_up(levels, option), two_sided=two_sided)


def _of_most_codes(count: int, ask: Callable[[int], _Told | None]) -> _Told | None:
    """Return what a format tells of its codes, of as many as it has: it may have fewer levels than codes."""
    return next((told for most in range(count, 1, -1) if (told := ask(most)) is not None), None)


def _filled_up(levels: Tensor, option: Option) -> Tensor:
    """Return a level for each code, 0 for those that the format has not."""
    table = torch.zeros(1 << option.bits)
    table[: len(levels)] = levels
    return table


def _values(format: Format, option: Option, count: int, more: dict[str, Tensor]) -> Tensor | None:
    """Return what the first ``count`` codes stand for, ``[outputs, count]``; None where the format has not so many."""
    return dequantized(format, option, torch.arange(count).expand(len(SCALES), -1), torch.tensor(SCALES), more)


def _states_of(format: Format, option: Option) -> States | None:
    """Return the values of states, or None where some value is not that of its state.

    Each input is a run of two random codes and of those that make one of all states of ``MOST_STATE_BITS``: values are
    those of the last output, and those of all other outputs have to agree. Those of smaller states are repeated.
    """
    bits, count = option.bits, 1 << MOST_STATE_BITS
    length = -(-MOST_STATE_BITS // bits)
    last = torch.arange(count) >> (bits * torch.arange(length)[:, None].flip(0)) & ((1 << bits) - 1)
    first = torch.randint(0, 1 << bits, (2, count), generator=torch.Generator().manual_seed(0))
    codes = torch.cat([first, last])
    scales = torch.tensor(SCALES)[torch.arange(len(codes)) % len(SCALES)]
    values = dequantized(format, option, codes, scales, {})
    if values is None:
        return None
    states = torch.zeros_like(codes)
    for back in range(length):
        states[back:] |= codes[: len(codes) - back] << (bits * back)
    states &= count - 1
    table = values[-1] / scales[-1]
    if not torch.equal(values, table[states] * scales[:, None]):
        return None
    while len(table) > 2 and torch.equal(table[: len(table) // 2], table[len(table) // 2 :]):
        table = table[: len(table) // 2]
    return States(values=table.clone())


def _levels_of_bytes(format: Format, option: Option, names: set[str]) -> Levels | None:
    """Return the levels of codes whose scales are bytes: those under a byte that then stands for 1."""
    if not {"qweight", "scales"} <= names <= {"qweight", "scales", "scale_unit"}:
        return None
    unit = {"scale_unit": torch.ones(1)}
    found = _of_most_codes(1 << option.bits, lambda most: levels_under_bytes(format, option, torch.arange(most), unit))
    if found is None:
        return None
    return Levels(levels=_filled_up(found[0], option), two_sided=False, scale_values=found[1])


def _agree(values: Tensor | None, levels: Tensor) -> bool:
    return values is not None and torch.equal(values, levels * torch.tensor(SCALES)[:, None])
