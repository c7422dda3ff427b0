"""The product with a packed weight on the CPU as an operator of torch, which compiled graphs can hold.

``torch.ops.aptq.cpu_matmul`` and ``cpu_trellis_matmul`` are defined by ``Library.define``: an operator made by
``torch.library.custom_op`` costs several microseconds more a call, which small layers would feel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aptq.kernels.cpu.library import TILE, Library, Packed, load_kernels
from aptq.kernels.operators import define_product

_DIGITS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}
"""Bytes of the fixed-point numbers that activations become: enough that rounding to the dtype is what one sees."""

_DIRECT_STATES = 8
"""Rows that are multiplied by the values of states as they are looked up, four with one lookup (docs/backends.md)."""

_ROOM = 1 << 20
"""Weights that are unpacked at once for a dense product."""


def cpu_matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    below: Tensor | None,
    qzeros: Tensor | None,
    levels: Tensor | None,
    group: int,
    int8: bool,
    architecture: str,
    folder: str,
) -> Tensor:
    """Return ``x W^T``, ``[..., out]``, for ``x [..., in]`` of float32, float16 or bfloat16 (see ``Packed``).

    Args:
        x: activations.
        qweight: as in ``Packed``, and so the four after it.
        scales: of groups.
        below: scales of levels below 0, or None.
        qzeros: zeros of integers, or None.
        levels: what codes stand for, or None for integers.
        group: inputs that share a scale.
        int8: take activations as bytes, not as numbers of 16 or 24 bits.
        architecture: of the kernels; one that was built.
        folder: where they were built.
    """
    kernels = load_kernels(architecture, folder)
    packed = Packed(qweight, scales, below, qzeros, levels, x.shape[-1], group)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.shape[0] <= _direct_rows(kernels, packed, x.dtype, int8):
        y = kernels.multiply(rows, packed, 1 if int8 else _DIGITS[x.dtype])
    else:
        y = _by_strips(kernels, packed, rows)
    return y.view(*x.shape[:-1], packed.out_features)


def cpu_trellis_matmul(
    x: Tensor, qweight: Tensor, scales: Tensor, states: Tensor, group: int, architecture: str, folder: str
) -> Tensor:
    """Return what ``cpu_matmul`` does for a weight whose values are those of states (``Packed.states``)."""
    kernels = load_kernels(architecture, folder)
    packed = Packed(qweight, scales, None, None, None, x.shape[-1], group, states)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    direct = rows.shape[0] <= _DIRECT_STATES
    y = kernels.multiply(rows, packed, 0) if direct else _by_strips(kernels, packed, rows)
    return y.view(*x.shape[:-1], packed.out_features)


def _direct_rows(kernels: Library, packed: Packed, dtype: torch.dtype, int8: bool) -> float:
    """Return how many rows are multiplied by the codes themselves; for more, a dense product of strips is faster.

    From figures on a Zen 4 (docs/backends.md): there bytes beat a dense float32 product at any number of rows, and
    float16 has none that is fast.
    """
    if packed.levels is not None:
        return 8 if dtype == torch.bfloat16 else 16
    if not kernels.fast_bytes:
        return 8
    return 32 if dtype == torch.bfloat16 and not int8 else float("inf")


def _by_strips(kernels: Library, packed: Packed, x: Tensor) -> Tensor:
    """Return ``x W^T`` by unpacking some outputs of the weight at a time: float16 in float32, which is faster."""
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    height = -(-packed.in_features // TILE) * TILE
    width = min(max(_ROOM // height // TILE, 1), -(-packed.out_features // TILE)) * TILE
    room = torch.empty(height, width, dtype=dtype)
    y = x.new_empty(x.shape[0], packed.out_features)
    x = x.to(dtype)
    for begin in range(0, packed.out_features, width):
        end = min(begin + width, packed.out_features)
        y[:, begin:end] = x @ kernels.dense(packed, begin, end, room)
    return y


define_product(
    "cpu_matmul",
    "Tensor? below, Tensor? qzeros, Tensor? levels, int group, bool int8, str architecture, str folder",
    cpu_matmul,
    "CPU",
)
define_product(
    "cpu_trellis_matmul",
    "Tensor states, int group, str architecture, str folder",
    cpu_trellis_matmul,
    "CPU",
)
