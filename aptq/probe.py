"""What a format makes of tensors that nobody quantized: how ``aptq.meaning`` asks it."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from aptq import packing
from aptq.api import Format, Option

SCALES = (1.0, 0.5, 2.0)
"""Of the three outputs that are tried; powers of two change no digit of a level."""


def dequantized(
    format: Format, option: Option, codes: Tensor, scales: Tensor, more: dict[str, Tensor]
) -> Tensor | None:
    """Return what codes ``[outputs, inputs]`` stand for; None where the format has not all of them."""
    tensors = {"qweight": packing.pack(codes, option.bits), "scales": scales.reshape(1, -1), **more}
    try:
        return format.dequantize(format.unpack(tensors, option, (codes.shape[0], codes.shape[1])), option).contiguous()
    except (IndexError, KeyError):
        return None


def levels_under_bytes(
    format: Format, option: Option, codes: Tensor, more: dict[str, Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Return levels ``[n]`` of codes ``[n]`` and what bytes of scales stand for, ``[256]``; None where there are none.

    Every value has to be the product of both. One byte, whichever, stands for 1.
    """
    values = dequantized(format, option, codes.expand(256, -1), torch.arange(256, dtype=torch.uint8), more)
    if values is None:
        return None
    sizes = values.abs().nan_to_num(0, 0, 0)
    largest = int(sizes.amax(0).argmax())
    near_one = sizes[:, largest].log2().abs()  # neither levels nor scales are to be extreme
    order = near_one.argsort(stable=True).tolist()
    for dtype, byte in product((torch.float64, torch.float32), order):  # exactly, or else but for rounding
        levels = values[byte]
        if not bool(levels.isfinite().all()) or levels[largest] == 0:
            continue
        scales = values[:, largest] / levels[largest]
        finite = values.isfinite() & scales.isfinite()[:, None]
        if torch.equal((scales[:, None].to(dtype) * levels)[finite], values[finite].to(dtype)):
            return levels.clone(), scales
    return None
