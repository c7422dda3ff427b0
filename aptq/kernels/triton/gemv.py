"""Products of a few rows with a packed weight: each thread reads words of some outputs and adds up by itself."""

from __future__ import annotations

import triton
import triton.language as tl

from aptq.kernels.triton.codes import field_word, four_values


@triton.jit
def gemv(
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
    """Write ``out [splits, rows, N]``, float32: the products of ``x [rows, K]`` and a weight over each part of K.

    Program ``(i, j, b)`` takes ``COLUMNS`` outputs, the units of part ``j``, ``UNITS`` at a time, and ``ROWS`` rows. A
    unit's codes are summed as they are; its scale and zero come once: ``s (sum_k q_k x_k - z sum_k x_k)``, and with two
    scales ``s sum_k v_k x_k + (s' - s) sum_k min(v_k, 0) x_k``. Groups that are no whole units (``GROUP % 32``) have
    their scales read for every code, which is slow.

    Args:
        x: ``[rows, K]``.
        words: int32 ``[units, BITS, N]`` as in ``aptq.packing``.
        scales: ``[groups, N]``.
        below: the same for levels below 0; read if ``BELOW``.
        zeros: ``[groups, N]``, of any dtype; read if ``ZEROS``. Without, they are ``2^(BITS - 1)``.
        levels: float32 ``[2^BITS]``, what codes stand for; read if ``LEVELS``. Without, they are integers.
        out: where to.
        rows: of x.
        K: inputs.
        N: outputs.
        units: of 32 inputs.
        units_per_split: of one part.
        magic: see ``four_numbers``.
        BITS: of a code.
        PRIMARY: width of the first plane.
        GROUP: inputs of a group; 0: all.
        ZEROS: whether zeros are stored.
        LEVELS: whether codes stand for levels.
        BELOW: whether levels below 0 have a scale of their own.
        TAIL: whether the last unit is not full.
        EVEN: whether every part is a multiple of ``UNITS``.
        ROWS: of a program, a power of two.
        UNITS: a power of two.
        COLUMNS: a power of two.
    """
    n = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, None, :]
    m = (tl.program_id(2) * ROWS + tl.arange(0, ROWS))[:, None, None]
    split = tl.program_id(1)
    end = tl.minimum((split + 1) * units_per_split, units)
    MERGED: tl.constexpr = BITS != PRIMARY
    WIDTH: tl.constexpr = 2 * PRIMARY if MERGED else BITS
    STEP: tl.constexpr = 2 if MERGED else 1
    SPREAD: tl.constexpr = GROUP % 32 != 0
    ZERO: tl.constexpr = 0 if ZEROS or LEVELS else 1 << (BITS - 1)
    table = levels
    if LEVELS:
        table = tl.load(levels + tl.arange(0, 1 << BITS))
    total = tl.zeros((ROWS, UNITS, COLUMNS), tl.float32)
    for first in range(split * units_per_split, end, UNITS):
        unit = (first + tl.arange(0, UNITS))[None, :, None]
        keep = (n < N) & ((unit < end) | EVEN)
        keep_x = (m < rows) & ((unit < end) | EVEN)
        group = unit * 0 if GROUP == 0 else unit * 32 // GROUP
        part = tl.zeros((ROWS, UNITS, COLUMNS), tl.float32)
        part_below = tl.zeros((ROWS, UNITS, COLUMNS), tl.float32)
        sum_x = tl.zeros((ROWS, UNITS, 1), tl.float32)
        for w in tl.static_range(WIDTH):
            word = field_word(words + unit * (BITS * N) + n, N, keep, w, BITS, PRIMARY)
            for quad in tl.static_range(8 // WIDTH):
                values = four_values(word, table, magic, 4 * quad, WIDTH, BITS, LEVELS, ZERO, UNITS, COLUMNS)
                for i in tl.static_range(4):
                    k = unit * 32 + (w // STEP * (32 // PRIMARY) + w % STEP + STEP * (4 * quad + i))
                    value = values[i]
                    if SPREAD:
                        at = k // GROUP * N + n
                        keep_k = keep & (k < K)
                        scale = tl.load(scales + at, mask=keep_k, other=0).to(tl.float32)
                        if ZEROS:
                            value -= tl.load(zeros + at, mask=keep_k, other=0).to(tl.float32)
                        if BELOW:
                            scale_below = tl.load(below + at, mask=keep_k, other=0).to(tl.float32)
                            scale = tl.where(value < 0, scale_below, scale)
                        value *= scale
                    if TAIL:
                        value_x = tl.load(x + m * K + k, mask=keep_x & (k < K), other=0).to(tl.float32)
                    else:
                        value_x = tl.load(x + m * K + k, mask=keep_x, other=0).to(tl.float32)
                    part += value * value_x
                    if BELOW and not SPREAD:
                        part_below += tl.minimum(value, 0.0) * value_x
                    if ZEROS and not SPREAD:
                        sum_x += value_x
        if SPREAD:
            total += part
        else:
            if ZEROS:
                part -= tl.load(zeros + group * N + n, mask=keep, other=0).to(tl.float32) * sum_x
            scale = tl.load(scales + group * N + n, mask=keep, other=0).to(tl.float32)
            total += part * scale
            if BELOW:
                total += part_below * (tl.load(below + group * N + n, mask=keep, other=0).to(tl.float32) - scale)
    _store(out, tl.sum(total, 1), split, rows, N, ROWS, COLUMNS)


@triton.jit
def _store(out, result, split, rows, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write a program's ``result [ROWS, COLUMNS]``."""
    n = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    m = (tl.program_id(2) * ROWS + tl.arange(0, ROWS))[:, None]
    tl.store(out + (split * rows + m) * N + n, result, mask=(m < rows) & (n < N))
