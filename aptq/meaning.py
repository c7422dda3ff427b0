"""What the codes of a format mean, asked of the format itself: whoever can read such codes serves any such format."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aptq import packing
from aptq.api import Format, Option

_SCALES = (1.0, 0.5, 2.0)  # of the three outputs that are tried; powers of two change no digit of a level
_BELOW = (0.25, 1.0, 8.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Integers:
    """``w = (code - zero) * scale``; without stored zeros each is ``2^(bits - 1)``."""

    stored_zeros: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class Levels:
    """``w = level[code] * scale``, with a scale of its own (``scales_below``) for levels below 0 where there is one."""

    levels: Tensor  # float32 [2^bits]; 0 for codes that the format has not
    two_sided: bool


def meaning_of(format: Format, option: Option) -> Integers | Levels | None:
    """Return what codes of a width mean in a format, or None when it is neither of these.

    The format is given three outputs with every code in turn, scales that differ, and zeros that differ.
    """
    count = 1 << option.bits
    option = replace(option, group_size=-1)
    layout = format.packed_layout(option, (len(_SCALES), count))
    names = set(layout)
    if not all(dtype.is_floating_point for name, (_, dtype) in layout.items() if name.startswith("scales")):
        return None  # they are stored as something that stands for them
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
        return None
    if not two_sided and torch.equal(levels, torch.arange(1 << option.bits) - float(1 << (option.bits - 1))):
        return Integers(stored_zeros=False)
    table = torch.zeros(1 << option.bits)
    table[: len(levels)] = levels
    return Levels(levels=table, two_sided=two_sided)


def _values(format: Format, option: Option, count: int, more: dict[str, Tensor]) -> Tensor | None:
    """Return what the first ``count`` codes stand for, ``[outputs, count]``; None where the format has not so many."""
    codes = torch.arange(count).expand(len(_SCALES), -1)
    tensors = {"qweight": packing.pack(codes, option.bits), "scales": torch.tensor([_SCALES]), **more}
    try:
        return format.dequantize(format.unpack(tensors, option, (len(_SCALES), count)), option).contiguous()
    except (IndexError, KeyError):
        return None


def _agree(values: Tensor | None, levels: Tensor) -> bool:
    return values is not None and torch.equal(values, levels * torch.tensor(_SCALES)[:, None])
