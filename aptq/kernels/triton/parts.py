"""The sum of what programs computed of parts of the inputs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_up(parts, out, splits, size, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """Write the sums of ``parts [splits, size]`` over its first dimension, in one order: the same at every call.

    Args:
        parts: float32.
        out: ``[size]``, of any dtype.
        splits: how many parts.
        size: of a part.
        BLOCK: entries of a program, a power of two.
        COUNT: parts that are read at once, a power of two.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((COUNT, BLOCK), tl.float32)
    for first in range(0, splits, COUNT):
        split = first + tl.arange(0, COUNT)[:, None]
        total += tl.load(parts + split * size + at, mask=(split < splits) & (at < size), other=0)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.sum(total, 0), mask=at < size)
