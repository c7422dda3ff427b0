"""Products of a few rows with a weight whose values are those of states, and that weight dense.

Tiles are ``[UNITS, COLUMNS / 4, 2, 2]``: a thread has four neighbouring outputs, see ``runs``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aptq.kernels.triton.runs import state_values, windows


@triton.jit
def states_gemv(
    x,
    words,
    scales,
    values,
    out,
    rows,
    K,
    N,
    units,
    units_per_split,
    BITS: tl.constexpr,
    PRIMARY: tl.constexpr,
    STATE: tl.constexpr,
    GROUP: tl.constexpr,
    TAIL: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write ``out [splits, rows, N]``, float32, as ``gemv`` does, for ``w = value[state] * scale``.

    Args:
        values: float32 ``[2^STATE]``, what states stand for.
        STATE: bits of a state, which is made of the codes of an output and of those before it.

    The other arguments are those of ``gemv``.
    """
    n = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    end = tl.minimum((split + 1) * units_per_split, units)
    WIDTH: tl.constexpr = BITS if BITS == PRIMARY else 2 * PRIMARY
    STEP: tl.constexpr = 1 if BITS == PRIMARY else 2
    BACK: tl.constexpr = (STATE + BITS - 1) // BITS - 1
    FIELDS: tl.constexpr = 2 if WIDTH * (16 if BACK > 4 else 8) <= 16 else 1  # windows of a word
    SPREAD: tl.constexpr = GROUP % 32 != 0
    table = tl.load(values + tl.arange(0, 1 << STATE))
    total = tl.zeros((ROWS, UNITS, COLUMNS // 4, 2, 2), tl.float32)
    at_row = x + tl.reshape(m, (ROWS, 1, 1, 1, 1)) * K
    keep_row = tl.reshape(m < rows, (ROWS, 1, 1, 1, 1))
    for first in range(split * units_per_split, end, UNITS):
        unit = (first + tl.arange(0, UNITS))[:, None]
        keep_unit = (unit < end) | EVEN
        part = tl.zeros((ROWS, UNITS, COLUMNS // 4, 2, 2), tl.float32)
        k = tl.reshape(unit * 32, (1, UNITS, 1, 1, 1))
        keep_x = keep_row & ((k < end * 32) | EVEN)
        for w in tl.static_range(WIDTH):
            window = windows(words + unit * (BITS * N) + n, n, N, keep_unit, w, BITS, PRIMARY, STATE, UNITS, COLUMNS)
            for field in tl.static_range(FIELDS):
                value = state_values(window, table, 16 * field, BITS, STATE)
                at = w // STEP * (32 // PRIMARY) + w % STEP + STEP * (16 // WIDTH) * field
                part = _products(part, value, at_row, keep_x, k, scales, n, K, N, at, STEP, GROUP, TAIL, COLUMNS)
        if SPREAD:
            total += part
        else:
            group = unit * 0 if GROUP == 0 else unit * 32 // GROUP
            scale = tl.load(scales + group * N + n, mask=(n < N) & keep_unit, other=0).to(tl.float32)
            total += part * tl.reshape(scale, (1, UNITS, COLUMNS // 4, 2, 2))
    result = tl.reshape(tl.sum(total, 1), (ROWS, COLUMNS))
    tl.store(out + (split * rows + m[:, None]) * N + n, result, mask=(m < rows)[:, None] & (n < N))


@triton.jit
def _products(
    part,
    value,
    at_row,
    keep_x,
    k,
    scales,
    n,
    K,
    N,
    first,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    TAIL: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add to ``part`` values ``[UNITS, COLUMNS / 4, 2, 2, ...]`` times inputs, of which the first is ``k + first``.

    The further dimensions are significant as ``windows`` says: the last one most.
    """
    if len(value.shape) == 4:
        keep = (keep_x & (k + first < K)) if TAIL else keep_x
        if GROUP % 32 != 0:
            value *= _scale_of(scales, k + first, n, K, N, GROUP, value.shape[0], COLUMNS)
        return part + value[None] * tl.load(at_row + k + first, mask=keep, other=0).to(tl.float32)
    else:
        HALF: tl.constexpr = STEP << (len(value.shape) - 5)
        low, high = tl.split(value)
        part = _products(part, low, at_row, keep_x, k, scales, n, K, N, first, STEP, GROUP, TAIL, COLUMNS)
        return _products(part, high, at_row, keep_x, k, scales, n, K, N, first + HALF, STEP, GROUP, TAIL, COLUMNS)


@triton.jit
def _scale_of(scales, k, n, K, N, GROUP: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the scales ``[UNITS, COLUMNS / 4, 2, 2]`` of one input of each unit, ``k`` of any shape."""
    k = tl.reshape(k, (UNITS, 1))
    scale = tl.load(scales + k // GROUP * N + n, mask=(k < K) & (n < N), other=0).to(tl.float32)
    return tl.reshape(scale, (UNITS, COLUMNS // 4, 2, 2))


@triton.jit
def states_dense(
    words,
    scales,
    values,
    out,
    begin,
    end,
    width,
    K,
    N,
    units,
    BITS: tl.constexpr,
    PRIMARY: tl.constexpr,
    STATE: tl.constexpr,
    GROUP: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the outputs ``begin``, a multiple of 4, to ``end`` as ``out [K, width]``, as ``dense`` does.

    The other arguments are those of ``states_gemv``.
    """
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    n = begin + column
    unit = (tl.program_id(1) * UNITS + tl.arange(0, UNITS))[:, None]
    WIDTH: tl.constexpr = BITS if BITS == PRIMARY else 2 * PRIMARY
    STEP: tl.constexpr = 1 if BITS == PRIMARY else 2
    BACK: tl.constexpr = (STATE + BITS - 1) // BITS - 1
    FIELDS: tl.constexpr = 2 if WIDTH * (16 if BACK > 4 else 8) <= 16 else 1
    table = tl.load(values + tl.arange(0, 1 << STATE))
    group = unit * 0 if GROUP == 0 else unit * 32 // GROUP
    scale = tl.load(scales + group * N + n, mask=(n < end) & (unit < units), other=0).to(tl.float32)
    for w in tl.static_range(WIDTH):
        window = windows(words + unit * (BITS * N) + n, n, N, unit < units, w, BITS, PRIMARY, STATE, UNITS, COLUMNS)
        for field in tl.static_range(FIELDS):
            value = state_values(window, table, 16 * field, BITS, STATE)
            at = w // STEP * (32 // PRIMARY) + w % STEP + STEP * (16 // WIDTH) * field
            _write(value, out + column, width, n < end, scale, unit * 32, scales, n, K, N, at, STEP, GROUP, COLUMNS)


@triton.jit
def _write(
    value,
    to,
    width,
    keep,
    scale,
    k,
    scales,
    n,
    K,
    N,
    first,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write values ``[UNITS, COLUMNS / 4, 2, 2, ...]`` times their scales to the inputs of ``_products``."""
    if len(value.shape) == 4:
        if GROUP % 32 != 0:
            value *= _scale_of(scales, k + first, n, K, N, GROUP, value.shape[0], COLUMNS)
            scaled = tl.reshape(value, (value.shape[0], COLUMNS))
        else:
            scaled = tl.reshape(value, (value.shape[0], COLUMNS)) * scale
        tl.store(to + (k + first).to(tl.int64) * width, scaled, mask=keep & (k + first < K))
    else:
        HALF: tl.constexpr = STEP << (len(value.shape) - 5)
        low, high = tl.split(value)
        _write(low, to, width, keep, scale, k, scales, n, K, N, first, STEP, GROUP, COLUMNS)
        _write(high, to, width, keep, scale, k, scales, n, K, N, first + HALF, STEP, GROUP, COLUMNS)
