"""Products of a few rows with a weight of entries of codebooks, or of levels, whose groups may be small; and it dense.

Scales may be bytes that stand for floats, and come once for as many inputs as share one within a unit: 8, 16 or 32. The
codebook of each 8 inputs is named by four bits, above those of the code: all codebooks are one table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aptq.kernels.triton.codes import field_word


@triton.jit
def _entries(
    word,
    chosen,
    table,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return what a table has for the fields ``FIRST`` to ``FIRST + 3`` of words ``[1, UNITS, COLUMNS]``.

    ``chosen``, of that shape or 0, is the place of the codebook in the table. A gather puts the table into shared
    memory and waits for all threads, so that four fields share one.
    """
    MASK: tl.constexpr = (1 << BITS) - 1
    v0 = ((word >> (WIDTH * FIRST)) & MASK) | chosen
    v1 = ((word >> (WIDTH * (FIRST + 1))) & MASK) | chosen
    v2 = ((word >> (WIDTH * (FIRST + 2))) & MASK) | chosen
    v3 = ((word >> (WIDTH * (FIRST + 3))) & MASK) | chosen
    places = tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), (UNITS * COLUMNS * 4,))
    even, odd = tl.split(tl.reshape(tl.gather(table, places, 0), (1, UNITS, COLUMNS, 2, 2)))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def _chosen(selectors, EIGHT: tl.constexpr, BITS: tl.constexpr, SELECT: tl.constexpr):
    """Return the place of the codebook of the inputs ``8 EIGHT`` to ``8 EIGHT + 7`` of each unit in the table."""
    if SELECT == 0:
        return 0
    elif 4 * EIGHT >= BITS:
        return (selectors >> (4 * EIGHT - BITS)) & (((1 << SELECT) - 1) << BITS)
    else:
        return (selectors << (BITS - 4 * EIGHT)) & (((1 << SELECT) - 1) << BITS)


@triton.jit
def _scale(scales, scale_values, unit, n, N, keep, first, GROUP: tl.constexpr, BYTES: tl.constexpr):
    """Return the scales of input ``first`` of each unit as float32, of the shape of ``keep``."""
    group = unit * 0 if GROUP == 0 else (unit * 32 + first) // GROUP
    scale = tl.load(scales + group * N + n, mask=keep, other=0)
    if BYTES:
        return tl.load(scale_values + scale.to(tl.int32))
    else:
        return scale.to(tl.float32)


@triton.jit
def blocks_gemv(
    x,
    words,
    scales,
    scale_values,
    selectors,
    levels,
    out,
    rows,
    K,
    N,
    units,
    units_per_split,
    BITS: tl.constexpr,
    PRIMARY: tl.constexpr,
    SELECT: tl.constexpr,
    BYTES: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    TAIL: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write ``out [splits, rows, N]``, float32, as ``gemv`` does, for ``w = level[codebook, code] * scale``.

    Args:
        scales: ``[groups, N]``: floats, or if ``BYTES`` bytes.
        scale_values: float32 ``[256]``, what these stand for; read if ``BYTES``.
        selectors: int16 ``[units, N]``, four bits for each 8 inputs that name their codebook; read if ``SELECT``.
        levels: float32 ``[2^(SELECT + BITS)]``, the codebooks.
        SELECT: bits that name a codebook; 0: there is one.
        BYTES: whether scales are bytes.
        SPAN: inputs of a unit that share a scale: 8, 16 or 32, of which ``GROUP`` is a multiple where it is not 0.

    The other arguments are those of ``gemv``.
    """
    n = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, None, :]
    m = (tl.program_id(2) * ROWS + tl.arange(0, ROWS))[:, None, None]
    split = tl.program_id(1)
    end = tl.minimum((split + 1) * units_per_split, units)
    WIDTH: tl.constexpr = BITS if BITS == PRIMARY else 2 * PRIMARY
    STEP: tl.constexpr = 1 if BITS == PRIMARY else 2
    table = tl.load(levels + tl.arange(0, 1 << (BITS + SELECT)))
    total = tl.zeros((ROWS, UNITS, COLUMNS), tl.float32)
    for first in range(split * units_per_split, end, UNITS):
        unit = (first + tl.arange(0, UNITS))[None, :, None]
        keep = (n < N) & ((unit < end) | EVEN)
        keep_x = (m < rows) & ((unit < end) | EVEN)
        chosen = 0
        if SELECT:
            chosen = tl.load(selectors + unit * N + n, mask=keep, other=0).to(tl.int32)
        part = tl.zeros((ROWS, UNITS, COLUMNS), tl.float32)
        for run in tl.static_range(WIDTH // STEP):  # of words whose fields lie among each other
            for quad in tl.static_range(8 // WIDTH):
                for w in tl.static_range(STEP):
                    word = field_word(words + unit * (BITS * N) + n, N, keep, STEP * run + w, BITS, PRIMARY)
                    place = _chosen(chosen, (run * (32 // PRIMARY) + 4 * STEP * quad) // 8, BITS, SELECT)
                    values = _entries(word, place, table, 4 * quad, WIDTH, BITS, UNITS, COLUMNS)
                    for i in tl.static_range(4):
                        k = unit * 32 + (run * (32 // PRIMARY) + 4 * STEP * quad + w + STEP * i)
                        if TAIL:
                            value_x = tl.load(x + m * K + k, mask=keep_x & (k < K), other=0).to(tl.float32)
                        else:
                            value_x = tl.load(x + m * K + k, mask=keep_x, other=0).to(tl.float32)
                        part += values[i] * value_x
                if (run * (32 // PRIMARY) + 4 * STEP * (quad + 1)) % SPAN == 0:
                    begin = run * (32 // PRIMARY) + 4 * STEP * (quad + 1) - SPAN
                    keep_scale = keep & (unit * 32 + begin < K) if TAIL else keep
                    total += part * _scale(scales, scale_values, unit, n, N, keep_scale, begin, GROUP, BYTES)
                    part = tl.zeros((ROWS, UNITS, COLUMNS), tl.float32)
    n = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    m = (tl.program_id(2) * ROWS + tl.arange(0, ROWS))[:, None]
    tl.store(out + (split * rows + m) * N + n, tl.sum(total, 1), mask=(m < rows) & (n < N))


@triton.jit
def blocks_dense(
    words,
    scales,
    scale_values,
    selectors,
    levels,
    out,
    begin,
    end,
    width,
    K,
    N,
    units,
    BITS: tl.constexpr,
    PRIMARY: tl.constexpr,
    SELECT: tl.constexpr,
    BYTES: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the outputs ``begin`` to ``end`` as ``out [K, width]``, as ``dense`` does.

    The other arguments are those of ``blocks_gemv``.
    """
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, None, :]
    n = begin + column
    unit = (tl.program_id(1) * UNITS + tl.arange(0, UNITS))[None, :, None]
    keep = (n < end) & (unit < units)
    WIDTH: tl.constexpr = BITS if BITS == PRIMARY else 2 * PRIMARY
    STEP: tl.constexpr = 1 if BITS == PRIMARY else 2
    table = tl.load(levels + tl.arange(0, 1 << (BITS + SELECT)))
    chosen = 0
    if SELECT:
        chosen = tl.load(selectors + unit * N + n, mask=keep, other=0).to(tl.int32)
    for run in tl.static_range(WIDTH // STEP):
        for quad in tl.static_range(8 // WIDTH):
            begin = (run * (32 // PRIMARY) + 4 * STEP * quad) // SPAN * SPAN
            keep_scale = keep & (unit * 32 + begin < K)
            scale = _scale(scales, scale_values, unit, n, N, keep_scale, begin, GROUP, BYTES)
            for w in tl.static_range(STEP):
                word = field_word(words + unit * (BITS * N) + n, N, keep, STEP * run + w, BITS, PRIMARY)
                place = _chosen(chosen, (run * (32 // PRIMARY) + 4 * STEP * quad) // 8, BITS, SELECT)
                values = _entries(word, place, table, 4 * quad, WIDTH, BITS, UNITS, COLUMNS)
                for i in tl.static_range(4):
                    k = unit * 32 + (run * (32 // PRIMARY) + 4 * STEP * quad + w + STEP * i)
                    tl.store(out + k.to(tl.int64) * width + column, values[i] * scale, mask=keep & (k < K))
