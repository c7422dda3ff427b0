"""Codes of the layout of ``aptq.packing`` as float32, in registers.

Widths of several planes are merged word by word first, so that every word then holds fields of one code each: 3 bits
become fields of 4, and 5, 6 and 7 bits fields of 8, half as many as codes in a primary word. ``PRIMARY`` is the width
of the first plane; where it is ``BITS`` there is nothing to merge.

A word's fields become numbers without shifting each: ``(word & (mask << s)) | 0x4B000000`` are the bits of the float32
``2^23 + code 2^s``, and one fused multiply-add takes that to ``code - zero``, exactly. Fields are taken 16 bits at a
time, so that they lie within the 23 bits of a mantissa. Converting instead (I2F) is an instruction of a unit that is
many times slower.

Source of the idea: Kim et al., "Who Says Elephants Can't Run" (2022, arXiv 2211.10017), there with float16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def field_word(words, stride, keep, WORD: tl.constexpr, BITS: tl.constexpr, PRIMARY: tl.constexpr):
    """Return word number ``WORD`` of a unit, int32 like ``words``: ``BITS`` of them, or ``2 PRIMARY`` merged ones.

    Field ``i`` of it is code ``WORD // step * (32 // PRIMARY) + WORD % step + step * i`` of the unit, with a step of 2
    for merged words and of 1 for others.

    Args:
        words: pointers to the first word of each unit and output.
        stride: from a word of a unit to the next.
        keep: which to load; the others are 0.
        WORD: the number.
        BITS: of a code.
        PRIMARY: width of the first plane.
    """
    if BITS == PRIMARY:
        return tl.load(words + WORD * stride, mask=keep, other=0)
    else:
        FIELD: tl.constexpr = 0x11111111 if PRIMARY == 2 else 0x01010101
        word = tl.load(words + (WORD // 2) * stride, mask=keep, other=0)
        word = (word >> (PRIMARY * (WORD % 2))) & (FIELD * ((1 << PRIMARY) - 1))
        if BITS - PRIMARY >= 2:  # a plane of two bits
            more = tl.load(words + (PRIMARY + WORD // PRIMARY) * stride, mask=keep, other=0)
            word |= _to_the_left(more >> (2 * (WORD % PRIMARY)), PRIMARY, 0) & (FIELD * (3 << PRIMARY))
        if (BITS - PRIMARY) % 2 == 1:  # one of a single bit, the last
            more = tl.load(words + (BITS - 1) * stride, mask=keep, other=0)
            word |= _to_the_left(more, BITS - 1, WORD) & (FIELD * (1 << (BITS - 1)))
        return word


@triton.jit
def _to_the_left(word, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Return a word shifted by ``LEFT - RIGHT`` to the left."""
    if LEFT >= RIGHT:
        return word << (LEFT - RIGHT)
    else:
        return word >> (RIGHT - LEFT)


@triton.jit
def number(word, magic, SHIFT: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr):
    """Return ``code - ZERO`` as float32 for the codes in the bits from ``SHIFT`` on, all below bit 23, of each word."""
    shifted = ((word & (((1 << BITS) - 1) << SHIFT)) | magic).to(tl.float32, bitcast=True)
    return shifted * (1.0 / (1 << SHIFT)) - (8388608.0 / (1 << SHIFT) + ZERO)


@triton.jit
def four_numbers(word, magic, FIRST: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr):
    """Return ``code - ZERO`` of the fields ``FIRST`` to ``FIRST + 3``, each ``WIDTH`` bits from the one before.

    ``magic`` is ``MAGIC``, as an argument of the kernel: of two constants in the code, a mask and this one, the
    assembler makes two instructions, of a constant and a register one.
    """
    low = word >> (WIDTH * FIRST // 16 * 16)
    high = word >> (WIDTH * (FIRST + 3) // 16 * 16)  # of codes of 8 bits two fields are there, else the word above
    v0 = number(low, magic, WIDTH * FIRST % 16, BITS, ZERO)
    v1 = number(low, magic, WIDTH * (FIRST + 1) % 16, BITS, ZERO)
    v2 = number(high, magic, WIDTH * (FIRST + 2) % 16, BITS, ZERO)
    v3 = number(high, magic, WIDTH * (FIRST + 3) % 16, BITS, ZERO)
    return v0, v1, v2, v3


@triton.jit
def four_levels(
    word,
    table,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return what a table ``[2^BITS]`` has for the same fields of words ``[1, UNITS, COLUMNS]``.

    A gather puts the table into shared memory and waits for all threads, so that four fields share one.
    """
    MASK: tl.constexpr = (1 << BITS) - 1
    even = tl.join((word >> (WIDTH * FIRST)) & MASK, (word >> (WIDTH * (FIRST + 2))) & MASK)
    odd = tl.join((word >> (WIDTH * (FIRST + 1))) & MASK, (word >> (WIDTH * (FIRST + 3))) & MASK)
    codes = tl.reshape(tl.join(even, odd), (UNITS * COLUMNS * 4,))
    even, odd = tl.split(tl.reshape(tl.gather(table, codes, 0), (1, UNITS, COLUMNS, 2, 2)))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def four_values(
    word,
    table,
    magic,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    ZERO: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return what the codes in fields ``FIRST`` to ``FIRST + 3`` stand for: ``four_levels`` or ``four_numbers``."""
    if LEVELS:
        return four_levels(word, table, FIRST, WIDTH, BITS, UNITS, COLUMNS)
    else:
        return four_numbers(word, magic, FIRST, WIDTH, BITS, ZERO)


@triton.jit
def unit_values(
    words,
    stride,
    keep,
    table,
    magic,
    BITS: tl.constexpr,
    PRIMARY: tl.constexpr,
    LEVELS: tl.constexpr,
    ZERO: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return ``[COLUMNS, UNITS, 32]``, every code of some units in its place, for pointers ``[1, UNITS, COLUMNS]``.

    All codes of a unit and output stay with the thread that read the words: axes of two are joined, and then reordered
    by significance. Words and their fields are joined from the lowest bit of their numbers up, except for the two
    lowest bits of a field, which come as (1, 0).
    """
    WIDTH: tl.constexpr = BITS if BITS == PRIMARY else 2 * PRIMARY
    values = _words(words, stride, keep, table, magic, 0, WIDTH, BITS, PRIMARY, WIDTH, LEVELS, ZERO, UNITS, COLUMNS)
    values = tl.reshape(values, (UNITS, COLUMNS, 2, 2, 2, 2, 2))
    if BITS == PRIMARY:  # bits of k from the highest: those of the word, those of the field
        values = tl.permute(values, (1, 0, 6, 5, 4, 2, 3))
    elif PRIMARY == 2:  # two of the word, three of the field; the lowest of the word is the lowest of all
        values = tl.permute(values, (1, 0, 6, 4, 2, 3, 5))
    else:  # three of the word, two of the field
        values = tl.permute(values, (1, 0, 6, 5, 2, 3, 4))
    return tl.reshape(values, (COLUMNS, UNITS, 32))


@triton.jit
def _words(
    words,
    stride,
    keep,
    table,
    magic,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    PRIMARY: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    ZERO: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Join the values of words ``FIRST`` to ``FIRST + COUNT - 1``, a power of two, along new axes of two."""
    if COUNT == 1:
        word = field_word(words, stride, keep, FIRST, BITS, PRIMARY)
        return _fields(word, table, magic, 0, 32 // WIDTH, BITS, WIDTH, LEVELS, ZERO, UNITS, COLUMNS)
    else:
        HALF: tl.constexpr = COUNT // 2
        low = _words(words, stride, keep, table, magic, FIRST, HALF, BITS, PRIMARY, WIDTH, LEVELS, ZERO, UNITS, COLUMNS)
        high = _words(
            words, stride, keep, table, magic, FIRST + HALF, HALF, BITS, PRIMARY, WIDTH, LEVELS, ZERO, UNITS, COLUMNS
        )
        return tl.join(low, high)


@triton.jit
def _fields(
    word,
    table,
    magic,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    ZERO: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Join the values of fields ``FIRST`` to ``FIRST + COUNT - 1``, at least four, along new axes of two."""
    if COUNT == 4:
        values = four_values(word, table, magic, FIRST, WIDTH, BITS, LEVELS, ZERO, UNITS, COLUMNS)
        return tl.join(tl.join(values[0], values[2]), tl.join(values[1], values[3]))
    else:
        HALF: tl.constexpr = COUNT // 2
        low = _fields(word, table, magic, FIRST, HALF, BITS, WIDTH, LEVELS, ZERO, UNITS, COLUMNS)
        high = _fields(word, table, magic, FIRST + HALF, HALF, BITS, WIDTH, LEVELS, ZERO, UNITS, COLUMNS)
        return tl.join(low, high)
