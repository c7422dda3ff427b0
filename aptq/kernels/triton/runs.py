"""Codes of neighbouring outputs in one word, in registers: the states of trellis-coded weights.

A thread has the words of four neighbouring outputs, and the same words of those before them. The codes of one input are
brought together by transposing fields: of two words, the fields of even and of odd inputs make two words whose fields
are twice as wide, with the earlier output's code above the later one's; and so on. In the end each field is a *window*:
the codes of one input and of 8 or 16 outputs, from which the states of the last four are shifted out. So a step is
shared by all outputs that come after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aptq.kernels.triton.codes import field_word


@triton.jit
def _transposed(earlier, later, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Return ``[..., 2]``: the even and the odd fields of two words side by side, in fields of ``2 WIDTH`` bits.

    A field has ``BITS`` that count, from its lowest on; the others are 0.
    """
    FIELD: tl.constexpr = ((1 << BITS) - 1) * (0xFFFFFFFF // ((1 << (2 * WIDTH)) - 1))
    KEEP: tl.constexpr = FIELD - (FIELD >> 31 << 32)  # as int32
    MOVED: tl.constexpr = (FIELD << BITS) & 0xFFFFFFFF
    UP: tl.constexpr = MOVED - (MOVED >> 31 << 32)
    even = (later & KEEP) | ((earlier << BITS) & UP)
    odd = ((later >> WIDTH) & KEEP) | ((earlier >> (WIDTH - BITS)) & UP)
    return tl.join(even, odd)


@triton.jit
def _fours(
    words,
    n,
    N,
    unit_keep,
    BACK: tl.constexpr,
    WORD: tl.constexpr,
    BITS: tl.constexpr,
    PRIMARY: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return ``[UNITS, COLUMNS / 4, 2, 2]``: fields of the codes of four outputs, ``BACK`` before those of the tile.

    Field ``i`` of a word ``[..., a, b]`` is that of field ``4 i + 2 b + a`` of the word; for others see ``windows``.
    """
    WIDTH: tl.constexpr = BITS if BITS == PRIMARY else 2 * PRIMARY
    keep = unit_keep & (n >= BACK) & (n < N + BACK)
    word = field_word(words - BACK, N, keep, WORD, BITS, PRIMARY)
    earlier, later = tl.split(tl.reshape(word, (UNITS, COLUMNS // 4, 2, 2)))
    pairs = _transposed(earlier, later, WIDTH, BITS)  # [UNITS, COLUMNS / 4, pair, a]
    earlier, later = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    return _transposed(earlier, later, 2 * WIDTH, 2 * BITS)


@triton.jit
def windows(
    words,
    n,
    N,
    unit_keep,
    WORD: tl.constexpr,
    BITS: tl.constexpr,
    PRIMARY: tl.constexpr,
    STATE: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return word ``WORD`` of a unit as windows ``[UNITS, COLUMNS / 4, 2, 2, ...]`` of the codes of some inputs.

    A window ends with four outputs and begins with as many before them as a state of ``STATE`` bits reaches back, or
    more. Windows lie in fields of 16 or 32 bits: ``field(BITS, WIDTH, STATE)``. Field ``i`` of ``[..., a, b, c]`` is
    the window of field ``8 i + 4 c + 2 b + a`` of the word, and so on for more and fewer dimensions.

    Args:
        words: pointers to the first word of each unit and output, ``[UNITS, COLUMNS]``.
        n: outputs, ``[1, COLUMNS]``.
        N: how many there are, and so from a word of a unit to the next.
        unit_keep: which units there are, ``[UNITS, 1]``.
        WORD: the number; see ``field_word``.
        BITS: of a code.
        PRIMARY: width of the first plane.
        STATE: bits of a state.
        UNITS: of the tile.
        COLUMNS: of the tile.
    """
    WIDTH: tl.constexpr = BITS if BITS == PRIMARY else 2 * PRIMARY
    BACK: tl.constexpr = (STATE + BITS - 1) // BITS - 1  # outputs before its own that a state depends on
    own = _fours(words, n, N, unit_keep, 0, WORD, BITS, PRIMARY, UNITS, COLUMNS)
    before = _fours(words, n, N, unit_keep, 4, WORD, BITS, PRIMARY, UNITS, COLUMNS)
    if WIDTH == 8:  # fields are whole words, and what does not fit in is too old for any state
        return own | (before << (4 * BITS))
    else:
        eights = _transposed(before, own, 4 * WIDTH, 4 * BITS)
        if BACK <= 4:
            return eights
        else:
            later = _fours(words, n, N, unit_keep, 8, WORD, BITS, PRIMARY, UNITS, COLUMNS)
            if BACK <= 8:
                earlier = tl.zeros_like(later)
            else:
                earlier = _fours(words, n, N, unit_keep, 12, WORD, BITS, PRIMARY, UNITS, COLUMNS)
            return _transposed(_transposed(earlier, later, 4 * WIDTH, 4 * BITS), eights, 8 * WIDTH, 8 * BITS)


@triton.jit
def state_values(window, table, FIELD: tl.constexpr, BITS: tl.constexpr, STATE: tl.constexpr):
    """Return ``[UNITS, COLUMNS / 4, 2, 2, ...]``: what the states of all four outputs stand for.

    A gather puts the table into shared memory and waits for all threads: one serves a whole word's windows.

    Args:
        window: ``[UNITS, COLUMNS / 4, ...]`` with up to four dimensions of two behind these; see ``windows``.
        table: float32 ``[2^STATE]``.
        FIELD: lowest bit of the windows in their words.
        BITS: of a code.
        STATE: bits of a state.
    """
    MASK: tl.constexpr = (1 << STATE) - 1
    even = tl.join((window >> (FIELD + 3 * BITS)) & MASK, (window >> (FIELD + BITS)) & MASK)
    odd = tl.join((window >> (FIELD + 2 * BITS)) & MASK, (window >> FIELD) & MASK)
    states = tl.join(even, odd)
    values = tl.reshape(tl.gather(table, tl.reshape(states, (states.numel,)), 0), states.shape)
    if len(window.shape) == 4:
        return tl.permute(values, (0, 1, 4, 5, 2, 3))
    elif len(window.shape) == 5:
        return tl.permute(values, (0, 1, 5, 6, 2, 3, 4))
    else:
        return tl.permute(values, (0, 1, 6, 7, 2, 3, 4, 5))
