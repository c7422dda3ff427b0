"""What the codes of a format mean, asked of the format itself: whoever can read such codes serves any such format."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from aptq import packing
from aptq.api import Format, Option
from aptq.probe import dequantized, levels_under_bytes

_SCALES = (1.0, 0.5, 2.0)  # of the three outputs that are tried; powers of two change no digit of a level
_BELOW = (0.25, 1.0, 8.0)

_MOST_INPUTS = 1024  # of a block

Stored = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a stored tensor."""

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


@dataclass(frozen=True, eq=False, kw_only=True)
class Blocks:
    """``w = codebook[selector][code] * scale``, with a selector for each run of inputs, and codebooks of the layer.

    ``selectors`` are packed (``aptq.packing``) as codes ``[blocks, out]``, without them there is one codebook;
    ``codebooks_of`` reads the codebooks. Where scales are stored as bytes, ``scale_values`` says what these stand for,
    times ``scale_unit [1]`` where that is stored.
    """

    block_size: int  # inputs
    count: int  # of codebooks, a power of two
    scale_values: Tensor | None  # float32 [256]; None: scales are floats

    @property
    def selector_bits(self) -> int:
        """Of a selector; 0: there are none."""
        return self.count.bit_length() - 1


Meaning = Integers | Levels | States | Blocks


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
    layout = format.packed_layout(option, (len(_SCALES), count))
    names = set(layout)
    if "codebooks" in names:
        return _blocks_of(format, option, layout)
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
    values = None
    while values is None and count > 1:  # a format may have fewer levels than codes
        values = _values(format, option, count, below)
        count -= values is None
    if values is None:
        return None
    levels = values[0] / (torch.where(values[0] < 0, _BELOW[0], 1.0) if two_sided else 1.0)
    if two_sided and not torch.equal(
        values, levels * torch.where(levels < 0, torch.tensor(_BELOW)[:, None], torch.tensor(_SCALES)[:, None])
    ):
        return None
    if not two_sided and not _agree(values, levels.expand(len(_SCALES), -1)):
        return _states_of(format, option)
    if not two_sided and torch.equal(levels, torch.arange(1 << option.bits) - float(1 << (option.bits - 1))):
        return Integers(stored_zeros=False)
    table = torch.zeros(1 << option.bits)
    table[: len(levels)] = levels
    return Levels(levels=table, two_sided=two_sided)


def _values(format: Format, option: Option, count: int, more: dict[str, Tensor]) -> Tensor | None:
    """Return what the first ``count`` codes stand for, ``[outputs, count]``; None where the format has not so many."""
    return dequantized(format, option, torch.arange(count).expand(len(_SCALES), -1), torch.tensor(_SCALES), more)


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
    scales = torch.tensor(_SCALES)[torch.arange(len(codes)) % len(_SCALES)]
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
    count, found = 1 << option.bits, None
    while found is None and count > 1:  # a format may have fewer levels than codes
        found = levels_under_bytes(format, option, torch.arange(count), {"scale_unit": torch.ones(1)})
        count -= found is None
    if found is None:
        return None
    table = torch.zeros(1 << option.bits)
    table[:count] = found[0]
    return Levels(levels=table, two_sided=False, scale_values=found[1])


def codebooks_of(meaning: Blocks, format: Format, option: Option, codebooks: Tensor) -> Tensor:
    """Return the codebooks of a layer, float32 ``[count, 2^bits]``, from what is stored of them."""
    entries = 1 << option.bits
    selectors = torch.arange(meaning.count)[:, None].expand(-1, entries)
    codes = torch.arange(entries)[:, None].expand(-1, meaning.count * meaning.block_size)
    values = _of_blocks(
        meaning, format, replace(option, group_size=-1), codes, selectors, _one(meaning, entries), codebooks.cpu()
    )
    assert values is not None  # it was asked the same when its meaning was found
    return values[:, :: meaning.block_size].T.contiguous()


def _one(meaning: Blocks, outputs: int) -> Tensor:
    """Return scales of 1."""
    if meaning.scale_values is None:
        return torch.ones(outputs)
    return (meaning.scale_values == 1).nonzero()[0].to(torch.uint8).expand(outputs)


def _of_blocks(
    meaning: Blocks, format: Format, option: Option, codes: Tensor, selectors: Tensor, scales: Tensor, codebooks: Tensor
) -> Tensor | None:
    more = {"codebooks": codebooks, "scale_unit": torch.ones(1)}
    if meaning.count > 1:
        more["selectors"] = packing.pack(selectors, meaning.selector_bits)
    return dequantized(format, option, codes, scales, more)


def _blocks_of(format: Format, option: Option, layout: Mapping[str, Stored]) -> Blocks | None:
    """Return the blocks of a format that has codebooks, or None where values are not those of ``Blocks``."""
    names, entries = set(layout), 1 << option.bits
    if not {"qweight", "scales", "codebooks"} <= names <= {"qweight", "scales", "scale_unit", "selectors", "codebooks"}:
        return None
    generator = torch.Generator().manual_seed(0)
    shape, dtype = layout["codebooks"]
    if dtype != torch.int32:
        return None
    codebooks = torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(dtype)
    size, count = _size_of_blocks(format, option) if "selectors" in names else (_MOST_INPUTS, 1)
    if not size:
        return None
    meaning, scales = Blocks(block_size=size, count=count, scale_values=None), torch.tensor(_SCALES)
    if layout["scales"][1] == torch.uint8:
        more = {"codebooks": codebooks, "scale_unit": torch.ones(1)}
        if count > 1:
            more["selectors"] = packing.pack(torch.zeros(1, 256, dtype=torch.int64), meaning.selector_bits)
        bytes_of = levels_under_bytes(format, option, torch.arange(min(entries, size)), more)
        if bytes_of is None:
            return None
        meaning = replace(meaning, scale_values=bytes_of[1])
        scales = (_one(meaning, 3).int() + torch.tensor([0, -7, 5])).to(torch.uint8)
        factors = bytes_of[1][scales.long()]
    else:
        factors = scales
    table = codebooks_of(meaning, format, option, codebooks)
    codes = torch.randint(0, entries, (3, 5 * size + size // 2), generator=generator)
    selectors = torch.randint(0, count, (-(-codes.shape[1] // size), 3), generator=generator)
    values = _of_blocks(meaning, format, option, codes, selectors, scales, codebooks)
    chosen = selectors.T.repeat_interleave(size, 1)[:, : codes.shape[1]]
    same = values is not None and torch.equal(values, table[chosen, codes] * factors[:, None])
    return meaning if same else None


def _size_of_blocks(format: Format, option: Option) -> tuple[int, int]:
    """Return the inputs of a block and the number of codebooks, by the shape of the selectors; (0, 0): not found."""
    for width in range(1, _MOST_INPUTS + 1):
        (_, bits, blocks), dtype = format.packed_layout(option, (1, width + 1))["selectors"]
        if blocks == 2:
            return (width, 1 << bits) if dtype == torch.int32 else (0, 0)
    return 0, 0


def _agree(values: Tensor | None, levels: Tensor) -> bool:
    return values is not None and torch.equal(values, levels * torch.tensor(_SCALES)[:, None])
