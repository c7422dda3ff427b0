"""Products of a few rows with a weight of vectors from a codebook, and that weight dense.

A vector is some neighbouring outputs of one input. A thread takes whole ones: it reads the words of their indices, and
for each index a row of the codebook at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aptq.kernels.triton.codes import field_word


@triton.jit
def _floats(word, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """Return ``[..., n]``: the floats in words of ``WIDTH`` bits, the lowest first, as float32."""
    if WIDTH == 64 and dtype == tl.float32:
        halves = tl.join(word.to(tl.int32), (word >> 32).to(tl.int32))
        return halves.to(tl.float32, bitcast=True)
    elif WIDTH == 64:
        even = tl.join(word, word >> 32)
        return tl.join(even, even >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    else:
        return tl.join(word, word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _rows(word, codebook, first, FIELD: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, LENGTH: tl.constexpr):
    """Return the rows ``[1, UNITS, VECTORS, 2, ...]`` that field ``FIELD`` of each word names, as float32.

    ``first`` is the row at which the codebook of each unit begins, ``[1, UNITS, 1]``. Rows are read as integers of 64
    bits: loads of floats ``[..., LENGTH]`` would go from thread to thread through shared memory.
    """
    dtype: tl.constexpr = codebook.dtype.element_ty
    row = first + ((word >> (WIDTH * FIELD)) & ((1 << BITS) - 1))
    SIZE: tl.constexpr = LENGTH * dtype.primitive_bitwidth
    if SIZE == 32:
        found = tl.load(codebook.to(tl.pointer_type(tl.int32), bitcast=True) + row)
    else:
        at = codebook.to(tl.pointer_type(tl.int64), bitcast=True) + row * (SIZE // 64)
        if SIZE == 64:
            found = tl.load(at)
        elif SIZE == 128:
            found = tl.join(tl.load(at), tl.load(at + 1))
        else:
            even = tl.join(tl.load(at), tl.load(at + 2))
            found = tl.join(even, tl.join(tl.load(at + 1), tl.load(at + 3)))
    return _floats(found, 32 if SIZE == 32 else 64, dtype)


@triton.jit
def _vectors(
    word,
    more,
    codebook,
    residual_codebook,
    group,
    FIELD: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    LENGTH: tl.constexpr,
    CENTROIDS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Return the vectors ``[1, UNITS, VECTORS, 2, ...]`` of one input of each unit, of the codebooks of its group."""
    value = _rows(word, codebook, group * CENTROIDS, FIELD, WIDTH, BITS, LENGTH)
    if RESIDUAL:
        value += _rows(more, residual_codebook, group * RESIDUAL, FIELD, WIDTH, BITS, LENGTH)
    return value


@triton.jit
def _widened(value, DIMENSIONS: tl.constexpr):
    """Return a tensor with so many dimensions, of one behind its own."""
    for _ in tl.static_range(DIMENSIONS - len(value.shape)):
        value = tl.expand_dims(value, len(value.shape))
    return value


@triton.jit
def vectors_gemv(
    x,
    words,
    codebook,
    residual_words,
    residual_codebook,
    row_scales,
    column_scales,
    out,
    rows,
    K,
    N,
    units,
    units_per_split,
    BITS: tl.constexpr,
    PRIMARY: tl.constexpr,
    LENGTH: tl.constexpr,
    LOG_LENGTH: tl.constexpr,
    CENTROIDS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BY_ROW: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    GROUP: tl.constexpr,
    TAIL: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write ``out [splits, rows, N]``, float32, as ``gemv`` does, for ``w = (C[i] + R[r]) row_scale column_scale``.

    Args:
        words: int32 ``[units, BITS, ceil(N / LENGTH)]``, the indices of vectors as codes in ``aptq.packing``.
        codebook: ``[groups, CENTROIDS, LENGTH]``.
        residual_words: indices into the residual codebook, likewise; read if ``RESIDUAL``.
        residual_codebook: ``[groups, RESIDUAL, LENGTH]``; read if ``RESIDUAL``.
        row_scales: of vectors; read if ``BY_ROW``.
        column_scales: of inputs; read if ``BY_COLUMN``.
        LENGTH: outputs of a vector, of which ``COLUMNS`` is a multiple.
        LOG_LENGTH: of which power of two that is.
        CENTROIDS: vectors of a codebook.
        RESIDUAL: of a residual one; 0: there is none.
        BY_ROW: whether vectors have scales.
        BY_COLUMN: whether inputs have.
        GROUP: inputs that share codebooks; 0: all.

    The other arguments are those of ``gemv``.
    """
    VECTORS: tl.constexpr = COLUMNS // LENGTH
    WIDTH: tl.constexpr = BITS if BITS == PRIMARY else 2 * PRIMARY
    STEP: tl.constexpr = 1 if BITS == PRIMARY else 2
    SPREAD: tl.constexpr = GROUP % 32 != 0
    vectors = (N + LENGTH - 1) // LENGTH
    vector = (tl.program_id(0) * VECTORS + tl.arange(0, VECTORS))[None, None, :]
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    at_row = x + m[:, None, None] * K
    split = tl.program_id(1)
    end = tl.minimum((split + 1) * units_per_split, units)
    total = tl.zeros((ROWS, UNITS, VECTORS), tl.float32)
    for _ in tl.static_range(LOG_LENGTH):
        total = tl.join(total, total)
    for first in range(split * units_per_split, end, UNITS):
        unit = (first + tl.arange(0, UNITS))[None, :, None]
        keep = (vector < vectors) & ((unit < end) | EVEN)
        keep_x = (m < rows)[:, None, None] & ((unit < end) | EVEN)
        group = unit * 0 if GROUP == 0 else tl.minimum(unit * 32, K - 1) // GROUP
        for w in tl.static_range(WIDTH):
            word = field_word(words + unit * (BITS * vectors) + vector, vectors, keep, w, BITS, PRIMARY)
            more = word
            if RESIDUAL:
                more = field_word(residual_words + unit * (BITS * vectors) + vector, vectors, keep, w, BITS, PRIMARY)
            for i in tl.static_range(32 // WIDTH):
                k = unit * 32 + (w // STEP * (32 // PRIMARY) + w % STEP + STEP * i)
                if SPREAD:
                    group = tl.minimum(k, K - 1) // GROUP
                value = _vectors(
                    word, more, codebook, residual_codebook, group, i, WIDTH, BITS, LENGTH, CENTROIDS, RESIDUAL
                )
                keep_k = (keep_x & (k < K)) if TAIL else keep_x
                value_x = tl.load(at_row + k, mask=keep_k, other=0).to(tl.float32)
                if BY_COLUMN:
                    keep_scale = ((unit < end) | EVEN) & (k < K) if TAIL else (unit < end) | EVEN
                    value_x *= tl.load(column_scales + k, mask=keep_scale, other=0).to(tl.float32)
                total += value * _widened(value_x, 3 + LOG_LENGTH)
    vector = (tl.program_id(0) * VECTORS + tl.arange(0, VECTORS))[None, :]
    result = tl.reshape(tl.sum(total, 1), (ROWS, VECTORS, LENGTH))
    if BY_ROW:
        result *= tl.load(row_scales + vector, mask=vector < vectors, other=0).to(tl.float32)[:, :, None]
    n = vector[:, :, None] * LENGTH + tl.arange(0, LENGTH)[None, None, :]
    m = m[:, None, None]
    tl.store(out + (split * rows + m) * N + n, result, mask=(m < rows) & (n < N))


@triton.jit
def vectors_dense(
    words,
    codebook,
    residual_words,
    residual_codebook,
    row_scales,
    column_scales,
    out,
    begin,
    end,
    width,
    K,
    N,
    units,
    BITS: tl.constexpr,
    PRIMARY: tl.constexpr,
    LENGTH: tl.constexpr,
    LOG_LENGTH: tl.constexpr,
    CENTROIDS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BY_ROW: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    GROUP: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the outputs ``begin``, a multiple of ``LENGTH``, to ``end`` as ``out [K, width]``, as ``dense`` does.

    The other arguments are those of ``vectors_gemv``.
    """
    VECTORS: tl.constexpr = COLUMNS // LENGTH
    WIDTH: tl.constexpr = BITS if BITS == PRIMARY else 2 * PRIMARY
    STEP: tl.constexpr = 1 if BITS == PRIMARY else 2
    vectors = (N + LENGTH - 1) // LENGTH
    place = (tl.program_id(0) * VECTORS + tl.arange(0, VECTORS))[None, None, :]
    vector = begin // LENGTH + place
    unit = (tl.program_id(1) * UNITS + tl.arange(0, UNITS))[None, :, None]
    keep = (vector < vectors) & (unit < units)
    column = place[:, :, :, None] * LENGTH + tl.arange(0, LENGTH)
    scale = tl.full((1, 1, VECTORS), 1.0, tl.float32)
    if BY_ROW:
        scale = tl.load(row_scales + vector, mask=vector < vectors, other=0).to(tl.float32)
    for w in tl.static_range(WIDTH):
        word = field_word(words + unit * (BITS * vectors) + vector, vectors, keep, w, BITS, PRIMARY)
        more = word
        if RESIDUAL:
            more = field_word(residual_words + unit * (BITS * vectors) + vector, vectors, keep, w, BITS, PRIMARY)
        for i in tl.static_range(32 // WIDTH):
            k = unit * 32 + (w // STEP * (32 // PRIMARY) + w % STEP + STEP * i)
            group = unit * 0 if GROUP == 0 else tl.minimum(k, K - 1) // GROUP
            value = _vectors(
                word, more, codebook, residual_codebook, group, i, WIDTH, BITS, LENGTH, CENTROIDS, RESIDUAL
            )
            value = tl.reshape(value, (1, UNITS, VECTORS, LENGTH))
            scale_k = scale
            if BY_COLUMN:
                scale_k = scale * tl.load(column_scales + k, mask=k < K, other=0).to(tl.float32)
            keep_k = (begin + column < end) & (k < K)[:, :, :, None]
            tl.store(out + k.to(tl.int64)[:, :, :, None] * width + column, value * scale_k[:, :, :, None], mask=keep_k)
