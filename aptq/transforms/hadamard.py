"""Random signs and a matrix whose entries are all of about one size: every input is spread over all others."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from aptq.api import AptqError

_WIDEST = 64  # Hadamard factor: a product with one of them is a small dense one
_LARGEST_ODD = 2048  # Hartley factor, which is dense


@dataclass(frozen=True)
class Hadamard:
    """``T = D (F_1 (x) F_2 (x) ...)``: signs ``D``, which the seed and the width give, and orthogonal factors.

    With ``in = m 2^k`` and ``m`` odd the factors are Hadamard matrices over ``2^k``, 64 wide at most, and the discrete
    Hartley matrix ``(cos + sin)(2 pi i j / m) / sqrt(m)`` of width ``m``, whose entries are at most ``sqrt(2 / m)``.
    All are symmetric and their own inverse. Each weight of ``W T`` is a signed mean of a whole row of ``W``, close to
    normally distributed whatever the row's outliers, and so is each input of ``x T``.

    Source: incoherence processing of Chee et al., "QuIP" (NeurIPS 2023), with the randomized Hadamard transform of
    Tseng et al., "QuIP#" (ICML 2024), on the side of the inputs; at run time as the online rotations of Ashkboos et
    al., "QuaRot" (NeurIPS 2024). Hartley's matrix for odd widths is ours.
    """

    seed: int = 0

    def check(self, in_features: int) -> None:
        """Raise ``AptqError`` for widths whose odd part would be a large dense matrix."""
        odd = in_features // (in_features & -in_features)
        if odd > _LARGEST_ODD:
            raise AptqError(
                f"Inputs of width {in_features} have the odd factor {odd}; transform=hadamard serves up to "
                f"{_LARGEST_ODD}. Use transform=none."
            )

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x T``; see ``aptq.api.Transform``."""
        exact = x.to(_exact(x))
        return _mixed(exact * _signs(self.seed, x.shape[-1], exact.dtype, exact.device)).to(x.dtype)

    def invert(self, x: Tensor) -> Tensor:
        """Return ``x T^T``; see ``aptq.api.Transform``."""
        exact = x.to(_exact(x))
        return (_mixed(exact) * _signs(self.seed, x.shape[-1], exact.dtype, exact.device)).to(x.dtype)


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _mixed(x: Tensor) -> Tensor:
    """Return ``x [..., n]`` times the Kronecker product of the factors of ``n``: one small product along each axis."""
    width = x.shape[-1]
    after = width
    for size in factor_sizes(width):
        after //= size
        factor = _factor(size, x.dtype, x.device)
        parts = x.reshape(-1, size, after)
        x = (parts[..., 0] @ factor if after == 1 else factor @ parts).reshape(x.shape)
    return x


def factor_sizes(width: int) -> Sequence[int]:
    """Return the widths of the factors: the odd part, if it is not 1, then powers of two that are alike in size."""
    power = (width & -width).bit_length() - 1
    count = math.ceil(power / (_WIDEST.bit_length() - 1))
    sizes = [1 << (power + each) // count for each in range(count)]
    odd = width >> power
    return [odd, *sizes] if odd > 1 else sizes


@lru_cache(maxsize=64)
def _factor(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a symmetric orthogonal matrix: Hadamard's for a power of two, Hartley's for an odd size."""
    if size % 2:
        index = torch.arange(size, dtype=torch.float64)
        angles = torch.outer(index, index).remainder_(size).mul_(2.0 * math.pi / size)
        return ((angles.cos() + angles.sin()) / math.sqrt(size)).to(device, dtype)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(size)).to(device, dtype)


@lru_cache(maxsize=64)
def _signs(seed: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``[width]`` of 1 and -1: bits of a hash, which no release of any library changes."""
    digest = hashlib.shake_256(f"{seed}:{width}".encode()).digest(-(-width // 8))
    bits = [byte >> bit & 1 for byte in digest for bit in range(8)][:width]
    return (1.0 - 2.0 * torch.tensor(bits, dtype=torch.float64)).to(device, dtype)
