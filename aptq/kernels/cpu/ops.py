"""The product with a packed weight on the CPU as an operator of torch, which compiled graphs can hold.

``torch.ops.aptq.cpu_matmul`` and ``cpu_trellis_matmul`` are defined by ``Library.define``: an operator made by
``torch.library.custom_op`` costs several microseconds more a call, which small layers would feel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aptq.errors import AptqError
from aptq.kernels.cpu.library import TILE, Library, Packed, Turn, load_kernels
from aptq.kernels.operators import Product, define_product
from aptq.packing import UNIT

_DIGITS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}
"""Bytes of the fixed-point numbers that activations become: enough that rounding to the dtype is what one sees."""

_DIRECT_STATES = 4
"""Rows that are multiplied by the values of states as they are looked up, with one lookup (docs/backends.md)."""

_BEFORE_TILES = 32
"""Rows up to which AMX is taken not to be worth a dense weight in memory (not measured on such a CPU)."""

_ROOM = 1 << 20
"""Weights that are unpacked at once for a dense product."""

_TURN, _BUILD = "Tensor? signs, Tensor? matrix", "str architecture, str folder"


def cpu_matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    below: Tensor | None,
    qzeros: Tensor | None,
    levels: Tensor | None,
    signs: Tensor | None,
    matrix: Tensor | None,
    group: int,
    int8: bool,
    architecture: str,
    folder: str,
) -> Tensor:
    """Return ``x W^T``, or ``x T W^T``, ``[..., out]``, for ``x [..., in]`` of float32, float16 or bfloat16.

    Args:
        x: activations.
        qweight: as in ``Packed``, and so the four after it.
        scales: of groups.
        below: scales of levels below 0, or None.
        qzeros: zeros of integers, or None.
        levels: what codes stand for, or None for integers.
        signs: of ``T``, as in ``Turn``, or None.
        matrix: of ``T``; None where there are no signs.
        group: inputs that share a scale.
        int8: take activations as bytes, not as numbers of 16 or 24 bits.
        architecture: of the kernels; one that was built.
        folder: where they were built.

    Raises:
        AptqError: the width of ``x`` is not the weight's.
    """
    weight = qweight, scales, below, qzeros, levels, signs, matrix, group, int8, architecture, folder
    return _product(_integers_or_levels(_width(x, qweight), x.dtype, *weight), x)


def cpu_trellis_matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    states: Tensor,
    signs: Tensor | None,
    matrix: Tensor | None,
    group: int,
    architecture: str,
    folder: str,
) -> Tensor:
    """Return what ``cpu_matmul`` does for a weight whose values are those of states (``Packed.states``)."""
    weight = qweight, scales, states, signs, matrix, group, architecture, folder
    return _product(_states(_width(x, qweight), x.dtype, *weight), x)


class _Weight(NamedTuple):
    """A weight as inputs of one width and dtype are multiplied by it."""

    kernels: Library
    packed: Packed
    turn: Turn | None
    digits: int
    most: float  # rows that are multiplied by the codes themselves


def _integers_or_levels(
    width: int,
    dtype: torch.dtype,
    qweight: Tensor,
    scales: Tensor,
    below: Tensor | None,
    qzeros: Tensor | None,
    levels: Tensor | None,
    signs: Tensor | None,
    matrix: Tensor | None,
    group: int,
    int8: bool,
    architecture: str,
    folder: str,
) -> _Weight:
    kernels = load_kernels(architecture, folder)
    packed = Packed(qweight, scales, below, qzeros, levels, width, group)
    most = _direct_rows(kernels, packed, dtype, int8)
    return _Weight(kernels, packed, _turn(signs, matrix), 1 if int8 else _DIGITS[dtype], most)


def _states(
    width: int,
    dtype: torch.dtype,
    qweight: Tensor,
    scales: Tensor,
    states: Tensor,
    signs: Tensor | None,
    matrix: Tensor | None,
    group: int,
    architecture: str,
    folder: str,
) -> _Weight:
    del dtype
    packed = Packed(qweight, scales, None, None, None, width, group, states)
    return _Weight(load_kernels(architecture, folder), packed, _turn(signs, matrix), 0, _DIRECT_STATES)


def _turn(signs: Tensor | None, matrix: Tensor | None) -> Turn | None:
    return None if signs is None or matrix is None else Turn(signs, matrix)


def _product(weight: _Weight, x: Tensor, threads: int | None = None) -> Tensor:
    if x.numel() <= weight.most * weight.packed.in_features:
        return weight.kernels.multiply(x.contiguous(), weight.packed, weight.digits, weight.turn, threads)
    return _many_rows(weight, x, threads)


def _kind(weight: _Weight) -> tuple[object, ...]:
    """Return what weights have in common that are multiplied in one call."""
    turn = weight.turn and (weight.turn.signs.data_ptr(), weight.turn.matrix.data_ptr())
    return weight.kernels, weight.digits, turn, weight.packed.levels is None, weight.packed.states is None


def _bound(make: Callable[..., _Weight], arguments: Sequence[tuple[Any, ...]], like: Tensor) -> Product:
    """Return the products with some weights for inputs like one, on as many threads as torch has now.

    Few rows are multiplied in one call where all weights are of a kind, else by one weight after the other.
    """
    weights, threads = [make(_width(like, each[0]), like.dtype, *each) for each in arguments], torch.get_num_threads()
    first, rows = weights[0], like.numel() // like.shape[-1]
    if any(_kind(each) != _kind(first) or rows > each.most for each in weights):
        if len(weights) == 1:
            return lambda x: _product(first, x, threads)
        return lambda x: torch.cat([_product(each, x, threads) for each in weights], -1)
    packed, shape = [each.packed for each in weights], like.shape[:-1]
    multiply = first.kernels.multiplier(packed, shape, like.dtype, first.digits, first.turn, threads)

    def product(x: Tensor) -> Tensor:
        return multiply(x.contiguous())

    return product


def _width(x: Tensor, qweight: Tensor) -> int:
    """Return the width of ``x``; refuse one that other inputs' codes, or none at all, would be read for."""
    width = x.shape[-1]
    if -(-width // UNIT) != qweight.shape[0]:
        most = UNIT * qweight.shape[0]
        raise AptqError(f"Inputs of width {width} were given to a weight of {most - UNIT + 1} to {most} inputs.")
    return width


def _direct_rows(kernels: Library, packed: Packed, dtype: torch.dtype, int8: bool) -> float:
    """Return how many rows are multiplied by the codes themselves; for more it is faster to unpack weights once.

    From figures on a Zen 4, with all of its instructions and with AVX2 alone (docs/backends.md).
    """
    pairs = dtype == torch.bfloat16 and kernels.fast_pairs
    if packed.levels is not None:
        if packed.below is not None:
            return 1
        return 4 if pairs or not kernels.fast_bytes else 12
    if int8:
        return float("inf")
    if kernels.fast_bytes:
        return 24 if pairs else float("inf")
    return 16 if dtype != torch.float32 and packed.qweight.shape[1] < 8 else 8


def _many_rows(weight: _Weight, x: Tensor, threads: int | None) -> Tensor:
    """Return ``x W^T``, ``[..., out]``, from weights that are unpacked once for all rows."""
    kernels, packed, turn = weight.kernels, weight.packed, weight.turn
    if kernels.tiles and x.dtype == torch.bfloat16 and x.numel() > packed.in_features * _BEFORE_TILES:
        return _by_strips(kernels, packed, x, turn)
    return kernels.many(x.contiguous(), packed, turn, threads)


def _by_strips(kernels: Library, packed: Packed, x: Tensor, turn: Turn | None) -> Tensor:
    """Return ``x W^T``, ``[..., out]``, by unpacking some outputs at a time: float16 in float32, which is faster."""
    rows = x.reshape(-1, packed.in_features).contiguous()
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    height = -(-packed.in_features // TILE) * TILE
    width = min(max(_ROOM // height // TILE, 1), -(-packed.out_features // TILE)) * TILE
    room = torch.empty(height, width, dtype=dtype)
    y = x.new_empty(rows.shape[0], packed.out_features)
    rows = (rows if turn is None else kernels.rotate(rows, turn)).to(dtype)
    for begin in range(0, packed.out_features, width):
        end = min(begin + width, packed.out_features)
        y[:, begin:end] = rows @ kernels.dense(packed, begin, end, room)
    return y.view(*x.shape[:-1], packed.out_features)


define_product(
    "cpu_matmul",
    f"Tensor? below, Tensor? qzeros, Tensor? levels, {_TURN}, int group, bool int8, {_BUILD}",
    cpu_matmul,
    "CPU",
    binder=partial(_bound, _integers_or_levels),
)
define_product(
    "cpu_trellis_matmul",
    f"Tensor states, {_TURN}, int group, {_BUILD}",
    cpu_trellis_matmul,
    "CPU",
    binder=partial(_bound, _states),
)
