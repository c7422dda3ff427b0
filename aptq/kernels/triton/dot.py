"""Products of some tens of rows with a packed weight by tensor cores, the weight as their left side.

Tensor cores multiply tiles of 64 (or 16) by at least 8: with the weight's outputs as the first dimension and the rows
of activations as the second, few rows waste little.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aptq.kernels.triton.codes import unit_values


@triton.jit
def dot(
    x,
    words,
    scales,
    below,
    zeros,
    levels,
    out,
    rows,
    K,
    N,
    units,
    units_per_split,
    magic,
    BITS: tl.constexpr,
    PRIMARY: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    LEVELS: tl.constexpr,
    BELOW: tl.constexpr,
    TAIL: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write ``out [splits, rows, N]``, float32, as ``gemv`` does, of which the arguments are.

    Weights are rounded to the dtype of ``x``, float16 or bfloat16, and sums are float32. Groups are whole units.
    """
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = (tl.program_id(2) * ROWS + tl.arange(0, ROWS))[:, None]
    split = tl.program_id(1)
    end = tl.minimum((split + 1) * units_per_split, units)
    ZERO: tl.constexpr = 0 if ZEROS or LEVELS else 1 << (BITS - 1)
    table = levels
    if LEVELS:
        table = tl.load(levels + tl.arange(0, 1 << BITS))
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    for first in range(split * units_per_split, end, UNITS):
        unit = (first + tl.arange(0, UNITS))[:, None]
        keep = (n < N)[None, :] & ((unit < end) | EVEN)
        at = (unit * 0 if GROUP == 0 else unit * 32 // GROUP) * N + n[None, :]
        scale = tl.trans(tl.load(scales + at, mask=keep, other=0).to(tl.float32))[:, :, None]
        words_at = (words + unit * (BITS * N) + n[None, :])[None, :, :]
        value = unit_values(words_at, N, keep[None, :, :], table, magic, BITS, PRIMARY, LEVELS, ZERO, UNITS, COLUMNS)
        if BELOW:
            scale_below = tl.trans(tl.load(below + at, mask=keep, other=0).to(tl.float32))[:, :, None]
            scale = tl.where(value < 0, scale_below, scale)
        value *= scale
        if ZEROS:
            value -= tl.trans(tl.load(zeros + at, mask=keep, other=0).to(tl.float32))[:, :, None] * scale
        weight = tl.reshape(value.to(x.dtype.element_ty), (COLUMNS, UNITS * 32))
        k = (first * 32 + tl.arange(0, UNITS * 32))[None, :]
        if TAIL or not EVEN:
            keep_x = (m < rows) & (k < tl.minimum(end * 32, K))
        else:
            keep_x = m < rows
        total = tl.dot(weight, tl.trans(tl.load(x + m * K + k, mask=keep_x, other=0)), total)
    tl.store(out + (split * rows + m) * N + n[None, :], tl.trans(total), mask=(m < rows) & (n < N)[None, :])
