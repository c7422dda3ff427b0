"""The product with a packed weight on the CPU as an operator of torch, which compiled graphs can hold.

``torch.ops.aptq.cpu_matmul`` and ``cpu_trellis_matmul`` are defined by ``Library.define``: an operator made by
``torch.library.custom_op`` costs several microseconds more a call, which small layers would feel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from aptq.errors import AptqError
from aptq.kernels.cpu.library import TILE, Library, Packed, Turn, load_kernels
from aptq.kernels.operators import define_product
from aptq.packing import UNIT

Product = Callable[[Tensor], Tensor]
"""With one weight: ``x W^T [..., out]`` of ``x [..., in]``."""

_DIGITS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}
"""Bytes of the fixed-point numbers that activations become: enough that rounding to the dtype is what one sees."""

_DIRECT_STATES = 8
"""Rows that are multiplied by the values of states as they are looked up, four with one lookup (docs/backends.md)."""

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
    return _product(_width(x, qweight), x.dtype, *weight)(x)


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
    return _states_product(_width(x, qweight), x.dtype, *weight)(x)


def _product(
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
) -> Product:
    """Return ``cpu_matmul`` as a function of ``x [..., width]`` of one dtype."""
    kernels = load_kernels(architecture, folder)
    packed = Packed(qweight, scales, below, qzeros, levels, width, group)
    most = _direct_rows(kernels, packed, dtype, int8)
    return _by_rows(kernels, packed, 1 if int8 else _DIGITS[dtype], _turn(signs, matrix), most)


def _states_product(
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
) -> Product:
    """Return ``cpu_trellis_matmul`` as a function of ``x [..., width]`` of one dtype."""
    del dtype
    packed = Packed(qweight, scales, None, None, None, width, group, states)
    return _by_rows(load_kernels(architecture, folder), packed, 0, _turn(signs, matrix), _DIRECT_STATES)


def _by_rows(kernels: Library, packed: Packed, digits: int, turn: Turn | None, most: float) -> Product:
    """Return the product that reads codes themselves for at most so many rows of ``x``, and unpacks them for more."""
    direct, most = kernels.bind(packed, digits, turn), most * packed.in_features

    def product(x: Tensor) -> Tensor:
        return direct(x.contiguous()) if x.numel() <= most else _by_strips(kernels, packed, x, turn)

    return product


def _turn(signs: Tensor | None, matrix: Tensor | None) -> Turn | None:
    return None if signs is None or matrix is None else Turn(signs, matrix)


def _bound(make: Callable[..., Product], qweight: Tensor, *weight: object) -> Product:
    """Return the product with a weight for inputs of any dtype, made when it first meets one."""
    made: dict[tuple[int, torch.dtype], Product] = {}

    def product(x: Tensor) -> Tensor:
        run = made.get((x.shape[-1], x.dtype))
        if run is None:
            width = _width(x, qweight)
            run = made[width, x.dtype] = make(width, x.dtype, qweight, *weight)
        return run(x)

    return product


def _width(x: Tensor, qweight: Tensor) -> int:
    """Return the width of ``x``; refuse one that other inputs' codes, or none at all, would be read for."""
    width = x.shape[-1]
    if -(-width // UNIT) != qweight.shape[0]:
        most = UNIT * qweight.shape[0]
        raise AptqError(f"Inputs of width {width} were given to a weight of {most - UNIT + 1} to {most} inputs.")
    return width


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
    binder=partial(_bound, _product),
)
define_product(
    "cpu_trellis_matmul",
    f"Tensor states, {_TURN}, int group, {_BUILD}",
    cpu_trellis_matmul,
    "CPU",
    binder=partial(_bound, _states_product),
)
