"""The dense weight, for products of many rows."""

from __future__ import annotations

import triton
import triton.language as tl

from aptq.kernels.triton.codes import field_word, four_values


@triton.jit
def dense(
    words,
    scales,
    below,
    zeros,
    levels,
    out,
    begin,
    end,
    width,
    K,
    N,
    units,
    magic,
    BITS: tl.constexpr,
    PRIMARY: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    LEVELS: tl.constexpr,
    BELOW: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the outputs ``begin`` to ``end`` of a weight as ``out [K, width]``, in the dtype of ``out``.

    Program ``(i, j)`` takes ``COLUMNS`` outputs and ``UNITS`` units. The other arguments are those of ``gemv``.
    """
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, None, :]
    n = begin + column
    unit = (tl.program_id(1) * UNITS + tl.arange(0, UNITS))[None, :, None]
    keep = (n < end) & (unit < units)
    WIDTH: tl.constexpr = BITS if BITS == PRIMARY else 2 * PRIMARY
    STEP: tl.constexpr = 1 if BITS == PRIMARY else 2
    SPREAD: tl.constexpr = GROUP % 32 != 0
    ZERO: tl.constexpr = 0 if ZEROS or LEVELS else 1 << (BITS - 1)
    table = levels
    if LEVELS:
        table = tl.load(levels + tl.arange(0, 1 << BITS))
    at = (unit * 0 if GROUP == 0 else unit * 32 // GROUP) * N + n
    scale = tl.load(scales + at, mask=keep, other=0).to(tl.float32)
    if ZEROS:
        zero = tl.load(zeros + at, mask=keep, other=0).to(tl.float32)
    if BELOW:
        scale_below = tl.load(below + at, mask=keep, other=0).to(tl.float32)
    for w in tl.static_range(WIDTH):
        word = field_word(words + unit * (BITS * N) + n, N, keep, w, BITS, PRIMARY)
        for quad in tl.static_range(8 // WIDTH):
            values = four_values(word, table, magic, 4 * quad, WIDTH, BITS, LEVELS, ZERO, UNITS, COLUMNS)
            for i in tl.static_range(4):
                k = unit * 32 + (w // STEP * (32 // PRIMARY) + w % STEP + STEP * (4 * quad + i))
                keep_k = keep & (k < K)
                if SPREAD:
                    at = k // GROUP * N + n
                    scale = tl.load(scales + at, mask=keep_k, other=0).to(tl.float32)
                    if ZEROS:
                        zero = tl.load(zeros + at, mask=keep_k, other=0).to(tl.float32)
                    if BELOW:
                        scale_below = tl.load(below + at, mask=keep_k, other=0).to(tl.float32)
                value = values[i]
                if ZEROS:
                    value -= zero
                value *= tl.where(value < 0, scale_below, scale) if BELOW else scale
                tl.store(out + k.to(tl.int64) * width + column, value, mask=keep_k)
