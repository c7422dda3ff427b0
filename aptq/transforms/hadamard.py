"""Random signs and a matrix whose entries are all of about one size: every input is spread over all others."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from aptq.api import AptqError, Rotation
from aptq.kernels.cpu import TYPES, Turn, kernels_for
from aptq.kernels.operators import OPERATORS, plain

_WIDEST = 64  # factor, as far as the odd part allows: a product with one of them is a small dense one
_LARGEST_ODD = 2048


@dataclass(frozen=True)
class Hadamard:
    """``T = D (C (x) H)``: signs ``D``, which the seed and the width give, and two orthogonal matrices.

    With ``in = m 2^k`` and ``m`` odd, ``H`` is the Hadamard matrix of width ``2^k`` and ``C`` the discrete Hartley
    matrix ``(cos + sin)(2 pi i j / m) / sqrt(m)`` of width ``m``, whose entries are at most ``sqrt(2 / m)``. Both are
    symmetric and their own inverse. Each weight of ``W T`` is a signed mean of a whole row of ``W``, close to
    normally distributed whatever the row's outliers, and so is each input of ``x T``.

    Source: incoherence processing of Chee et al., "QuIP" (NeurIPS 2023), with the randomized Hadamard transform of
    Tseng et al., "QuIP#" (ICML 2024), on the side of the inputs; at run time as the online rotations of Ashkboos et
    al., "QuaRot" (NeurIPS 2024). Hartley's matrix for odd widths is ours.

    On a CPU whose kernels can be built (``aptq.kernels.cpu``) ``apply`` is one of them; else, and in float64, both ways
    are a few small dense products. It is one operator of torch, ``aptq::hadamard``, which compiled graphs can hold.
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
        return self._turned(x, back=False)

    def invert(self, x: Tensor) -> Tensor:
        """Return ``x T^T``; see ``aptq.api.Transform``."""
        return self._turned(x, back=True)

    def rotation(self, in_features: int) -> Rotation:
        """Return ``T`` by its parts; see ``aptq.api.RotationTransform``."""
        signs = _signs(self.seed, in_features, torch.float32, torch.device("cpu"))
        return Rotation(signs=signs, matrix=_odd_factor(in_features))

    def _turned(self, x: Tensor, back: bool) -> Tensor:
        if plain(x):
            return turned(x, self.seed, back)
        y: Tensor = torch.ops.aptq.hadamard(x, self.seed, back)  # tensors without data, and graphs, stop at it
        return y


def turned(x: Tensor, seed: int, back: bool) -> Tensor:
    """Return ``x T``, or ``x T^T`` on the way back, for ``x [..., in]``, in its dtype."""
    width = x.shape[-1]
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    signs = _signs(seed, width, exact, x.device)
    if back:
        return (_mixed(x.to(exact)) * signs).to(x.dtype)
    if x.device.type == "cpu" and x.dtype in TYPES and (kernels := kernels_for("transform=hadamard")) is not None:
        return kernels.rotate(x.reshape(-1, width).contiguous(), Turn(signs, _odd_factor(width))).view(x.shape)
    return _mixed(x.to(exact) * signs).to(x.dtype)


@lru_cache(maxsize=64)
def _odd_factor(width: int) -> Tensor:
    """Return ``C`` of a width as ``Rotation`` has it: what norm ``H`` is to have is in it."""
    odd = width // (width & -width)
    return (_factor(odd, torch.float64, torch.device("cpu")) * math.sqrt(odd / width)).float().contiguous()


def _mixed(x: Tensor) -> Tensor:
    """Return ``x [..., n] (C (x) H)``: ``H`` is a Kronecker product itself, so one small product along each axis."""
    after = x.shape[-1]
    for size in factor_sizes(x.shape[-1]):
        after //= size
        factor = _factor(size, x.dtype, x.device)
        parts = x.reshape(-1, size, after)
        x = (parts[..., 0] @ factor if after == 1 else factor @ parts).reshape(x.shape)
    return x


def factor_sizes(width: int) -> Sequence[int]:
    """Return the widths of the factors: the odd part with what powers of two it can take, then the rest of them."""
    power = (width & -width).bit_length() - 1
    odd = width >> power
    most = _WIDEST.bit_length() - 1
    room = max(0, (_WIDEST // odd).bit_length() - 1)  # of powers of two beside the odd part
    others = math.ceil(max(0, power - room) / most)
    own = min(room, power // (1 + others))
    return [odd << own, *(1 << (power - own + each) // others for each in range(others))]


@lru_cache(maxsize=64)
def _factor(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``C (x) H`` of a width ``[size, size]``."""
    odd = size // (size & -size)
    index = torch.arange(odd, dtype=torch.float64)
    angles = torch.outer(index, index).remainder_(odd).mul_(2.0 * math.pi / odd)
    matrix = angles.cos() + angles.sin()
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(matrix, step)
    return (matrix / math.sqrt(size)).to(device, dtype)


@lru_cache(maxsize=64)
def _signs(seed: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``[width]`` of 1 and -1: bits of a hash, which no release of any library changes."""
    digest = hashlib.shake_256(f"{seed}:{width}".encode()).digest(-(-width // 8))
    bits = [byte >> bit & 1 for byte in digest for bit in range(8)][:width]
    return (1.0 - 2.0 * torch.tensor(bits, dtype=torch.float64)).to(device, dtype)


def _backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.aptq.hadamard(gradient, context.seed, not context.back), None, None


def _keep(ctx: Any, inputs: tuple[Tensor, int, bool], output: Tensor) -> None:
    del output
    _, ctx.seed, ctx.back = inputs


OPERATORS.define("hadamard(Tensor x, int seed, bool back) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
OPERATORS.impl("hadamard", turned, "CompositeExplicitAutograd")
torch.library.register_fake("aptq::hadamard", lambda x, seed, back: torch.empty_like(x), lib=OPERATORS)
torch.library.register_autograd("aptq::hadamard", _backward, setup_context=_keep, lib=OPERATORS)
