"""Starts the kernels on tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from aptq.kernels.triton.blocks import blocks_dense, blocks_gemv
from aptq.kernels.triton.configs import UNIT, Config
from aptq.kernels.triton.dense import dense
from aptq.kernels.triton.dot import dot
from aptq.kernels.triton.gemv import gemv
from aptq.kernels.triton.parts import add_up
from aptq.kernels.triton.states import states_dense, states_gemv
from aptq.kernels.triton.vectors import vectors_dense, vectors_gemv
from aptq.kernels.triton.weight import MAGIC, PRIMARY, PackedWeight, VectorWeight

Weight = PackedWeight | VectorWeight
_KERNELS = {
    "": {"gemv": gemv, "dot": dot, "dense": dense},
    "states": {"gemv": states_gemv, "dense": states_dense},
    "blocks": {"gemv": blocks_gemv, "dense": blocks_dense},
    "vectors": {"gemv": vectors_gemv, "dense": vectors_dense},
}
_STRIP = 1 << 26
"""Weights that are unpacked at once for a dense product."""


def multiply(x: Tensor, weight: Weight, config: Config, processors: int) -> Tensor:
    """Return ``x W^T``, ``[rows, out]``, for a contiguous ``x [rows, in]``, in its dtype.

    Args:
        x: activations, on the device of the weight.
        weight: the weight.
        config: kernel and tiles.
        processors: multiprocessors of the device.
    """
    if not x.shape[0]:
        return x.new_empty(0, weight.out_features)
    if config.kernel == "dense":
        return _by_strips(x, weight, config)
    return _by_parts(x, weight, config, processors)


def meanings(weight: Weight) -> dict[str, int]:
    """Return the kernels' constants that say what codes mean."""
    constants = {
        "BITS": weight.bits,
        "PRIMARY": PRIMARY[weight.bits],
        "GROUP": 0 if weight.group >= weight.in_features else weight.group,
    }
    if isinstance(weight, VectorWeight):
        centroids, length = weight.codebook.shape[1:]
        constants |= {"LENGTH": length, "LOG_LENGTH": _log2(length), "CENTROIDS": centroids}
        constants["RESIDUAL"] = 0 if weight.residual_codebook is None else weight.residual_codebook.shape[1]
        return constants | {
            "BY_ROW": weight.row_scales is not None,
            "BY_COLUMN": weight.column_scales is not None,
        }
    if weight.states is not None:
        return constants | {"STATE": _log2(len(weight.states))}
    if weight.kind == "blocks" and weight.levels is not None:
        constants |= {"SELECT": _log2(len(weight.levels)) - weight.bits, "BYTES": weight.scale_values is not None}
        return constants | {"SPAN": math.gcd(constants["GROUP"], UNIT)}
    constants |= {name: each is not None for name, each in (("ZEROS", weight.zeros), ("LEVELS", weight.levels))}
    return constants | {"BELOW": weight.below is not None, "magic": MAGIC}


def _log2(count: int) -> int:
    return count.bit_length() - 1


def kernel_of(weight: Weight, name: str) -> Any:
    """Return the kernel that does for a weight what a config names."""
    return _KERNELS[weight.kind][name]


def _tensors(weight: Weight) -> list[Tensor]:
    """Return the kernels' pointers; what a weight has not is never read."""
    if isinstance(weight, VectorWeight):
        optional = [weight.residual_indices, weight.residual_codebook, weight.row_scales, weight.column_scales]
        return [weight.indices, *_filled(weight.codebook, optional)]
    if weight.states is not None:
        return [weight.qweight, weight.scales, weight.states]
    first = (weight.scale_values, weight.selectors) if weight.kind == "blocks" else (weight.below, weight.zeros)
    return [weight.qweight, *_filled(weight.scales, (*first, weight.levels))]


def _filled(first: Tensor, others: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the first of some tensors and the others, with it in place of those that are None."""
    return [first, *(first if each is None else each for each in others)]


def _by_parts(x: Tensor, weight: Weight, config: Config, processors: int) -> Tensor:
    """Let each program compute some outputs of a part of the inputs, and add the parts up."""
    rows, out_features, units = x.shape[0], weight.out_features, weight.units
    grid = triton.cdiv(out_features, config.columns), 1, triton.cdiv(rows, config.rows)
    steps = triton.cdiv(units, config.units)
    steps_per_split = triton.cdiv(steps, max(1, config.programs * processors // (grid[0] * grid[2])))
    splits = triton.cdiv(steps, steps_per_split)
    y = x.new_empty(rows, out_features)
    parts = y if splits == 1 else torch.empty(splits, rows, out_features, dtype=torch.float32, device=x.device)
    kernel_of(weight, config.kernel)[(grid[0], splits, grid[2])](
        x,
        *_tensors(weight),
        parts,
        rows,
        weight.in_features,
        out_features,
        units,
        steps_per_split * config.units,
        **meanings(weight),
        TAIL=weight.in_features % UNIT != 0,
        EVEN=units % config.units == 0,
        ROWS=config.rows,
        UNITS=config.units,
        COLUMNS=config.columns,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if splits > 1:
        block = 128
        add_up[(triton.cdiv(y.numel(), block),)](parts, y, splits, y.numel(), BLOCK=block, COUNT=8, num_warps=4)
    return y


def _by_strips(x: Tensor, weight: Weight, config: Config) -> Tensor:
    """Unpack some outputs at a time for torch's product."""
    rows, out_features = x.shape[0], weight.out_features
    width = min(out_features, max(config.columns, _STRIP // weight.in_features // config.columns * config.columns))
    room = x.new_empty(weight.in_features, width)
    if width == out_features:
        return x @ unpack(weight, 0, out_features, room, config)
    y = x.new_empty(rows, out_features)
    for begin in range(0, out_features, width):
        end = min(begin + width, out_features)
        y[:, begin:end] = x @ unpack(weight, begin, end, room, config)
    return y


def unpack(weight: Weight, begin: int, end: int, room: Tensor, config: Config) -> Tensor:
    """Write ``W^T [in, end - begin]`` of some outputs into ``room [in, at least as many]`` and return that part."""
    units = weight.units
    kernel_of(weight, "dense")[(triton.cdiv(end - begin, config.columns), triton.cdiv(units, config.units))](
        *_tensors(weight),
        room,
        begin,
        end,
        room.shape[1],
        weight.in_features,
        weight.out_features,
        units,
        **meanings(weight),
        UNITS=config.units,
        COLUMNS=config.columns,
        num_warps=config.warps,
    )
    return room[:, : end - begin]
