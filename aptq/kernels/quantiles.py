"""Quantiles of the normal distribution that a few operations on 16-bit integers give: values that need no table."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

UNIT = 1 / 512
"""Values are this times integers of 11 bits and a sign: exact in float16 too."""

_MOST_BITS = 15


@cache
def quantiles(multiplier: int, bits: int) -> Tensor:
    """Return ``q(t(a s mod 2^bits))`` for ``s = 0 ... 2^bits - 1`` and an odd ``a``, float32.

    ``t(u) = (2 u + 1) / 2^bits - 1`` spreads over -1 to 1, and

        q(t) = t (1 + t^4 / 2 + t^64)

    is near 0.75 times the quantile ``ndtri((t + 1) / 2)``. All of it is done in 16 bits, as fixed-point numbers of 15
    bits behind the point whose products are rounded (``vpmulhrsw``): powers by squaring, the sum in units of 1 / 512,
    seven products, and results that are the same everywhere. Of such sums of two powers it is among those of least
    squares, tails weighted by ``1 + ndtri^2``, the one by which codes of 2 to 4 bits lose least.

    Raises:
        ValueError: ``bits`` are not 1 to 15.
    """
    if not 1 <= bits <= _MOST_BITS:
        raise ValueError(f"bits={bits} is not allowed; use 1 to {_MOST_BITS}.")
    rank = torch.arange(1 << bits, dtype=torch.int64).mul_(multiplier).remainder_(1 << bits)
    t = (2 * rank + 1 << _MOST_BITS - bits) - (1 << _MOST_BITS)
    powers = [t]  # of 1, 2, 4, ..., 64
    for _ in range(6):
        powers.append(_product(powers[-1], powers[-1]))
    return _product(t, 512 + (powers[2] >> 7) + (powers[6] >> 6)).float() * UNIT


def multiplier_of(values: Tensor) -> int | None:
    """Return the multiplier whose ``quantiles`` float32 ``[2^bits]`` are, or None where they are others."""
    bits = len(values).bit_length() - 1
    if not 1 <= bits <= _MOST_BITS or len(values) != 1 << bits:
        return None
    candidates = (quantiles(1, bits) == values[1]).nonzero()[:, 0].tolist()
    return next((each for each in candidates if each % 2 and torch.equal(quantiles(each, bits), values)), None)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of fixed-point numbers, half of the last bit rounded up."""
    return left * right + (1 << _MOST_BITS - 1) >> _MOST_BITS
