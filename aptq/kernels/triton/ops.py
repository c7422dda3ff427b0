"""The product with a packed weight on a GPU as an operator of torch, which compiled and captured graphs can hold.

``torch.ops.aptq.triton_matmul`` and its like are defined whether or not Triton is installed; the kernels are imported
when one is first called.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from aptq.kernels.operators import define_product
from aptq.kernels.triton.configs import UNIT, Case, choose
from aptq.kernels.triton.weight import PackedWeight, VectorWeight


def triton_matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    below: Tensor | None,
    zeros: Tensor | None,
    levels: Tensor | None,
    group: int,
    table: str,
) -> Tensor:
    """Return ``x W^T``, ``[..., out]``, for ``x [..., in]`` of float32, float16 or bfloat16 (see ``PackedWeight``).

    Args:
        x: activations.
        qweight: as in ``PackedWeight``, and so the five after it.
        scales: of groups.
        below: scales of levels below 0, or None.
        zeros: zeros of integers, or None.
        levels: what codes stand for, or None for integers.
        group: inputs that share a scale.
        table: a tuning table's path, or "".
    """
    weight = PackedWeight(
        qweight=qweight,
        scales=scales,
        below=below,
        zeros=zeros,
        levels=levels,
        in_features=x.shape[-1],
        group=group,
    )
    return _product(x, weight, table)


def triton_states_matmul(x: Tensor, qweight: Tensor, scales: Tensor, states: Tensor, group: int, table: str) -> Tensor:
    """Return what ``triton_matmul`` does for a weight whose values are those of states (``PackedWeight.states``)."""
    weight = PackedWeight(qweight=qweight, scales=scales, states=states, in_features=x.shape[-1], group=group)
    return _product(x, weight, table)


def triton_blocks_matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    scale_values: Tensor | None,
    selectors: Tensor | None,
    levels: Tensor,
    group: int,
    table: str,
) -> Tensor:
    """Return what ``triton_matmul`` does for a weight of codebooks, or whose scales are bytes (``PackedWeight``)."""
    weight = PackedWeight(
        qweight=qweight,
        scales=scales,
        scale_values=scale_values,
        selectors=selectors,
        levels=levels,
        in_features=x.shape[-1],
        group=group,
    )
    return _product(x, weight, table)


def triton_vectors_matmul(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    residual_indices: Tensor | None,
    residual_codebook: Tensor | None,
    row_scales: Tensor | None,
    column_scales: Tensor | None,
    out_features: int,
    group: int,
    table: str,
) -> Tensor:
    """Return what ``triton_matmul`` does for a weight of vectors (``VectorWeight``)."""
    weight = VectorWeight(
        indices=indices,
        codebook=codebook,
        residual_indices=residual_indices,
        residual_codebook=residual_codebook,
        row_scales=row_scales,
        column_scales=column_scales,
        out_features=out_features,
        in_features=x.shape[-1],
        group=group,
    )
    return _product(x, weight, table)


def _fake_of_vectors(x: Tensor, *rest: Any) -> Tensor:
    *_, out_features, _group, _table = rest
    return x.new_empty(*x.shape[:-1], out_features)


def _product(x: Tensor, weight: PackedWeight | VectorWeight, table: str) -> Tensor:
    from aptq.kernels.triton.launch import multiply

    in_features = weight.in_features
    rows = x.reshape(-1, in_features).contiguous()
    case = Case(
        rows=max(1, rows.shape[0]),
        out_features=weight.out_features,
        in_features=in_features,
        bits=weight.bits,
        levels=weight.levels is not None,
        dtype=x.dtype,
        whole_units=weight.group % UNIT == 0 or weight.group >= in_features,
        kind=weight.kind,
    )
    processors = _processors(x.device)
    y = multiply(rows, weight, choose(case, processors, table), processors)
    return y.view(*x.shape[:-1], weight.out_features)


@cache
def _processors(device: torch.device) -> int:
    """Return a GPU's number of multiprocessors; of anything else, on which kernels are interpreted, 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


define_product(
    "triton_matmul",
    "Tensor? below, Tensor? zeros, Tensor? levels, int group, str table",
    triton_matmul,
    "CUDA",
)
define_product("triton_states_matmul", "Tensor states, int group, str table", triton_states_matmul, "CUDA")
define_product(
    "triton_blocks_matmul",
    "Tensor? scale_values, Tensor? selectors, Tensor levels, int group, str table",
    triton_blocks_matmul,
    "CUDA",
)
define_product(
    "triton_vectors_matmul",
    "Tensor? residual_indices, Tensor? residual_codebook, Tensor? row_scales, Tensor? column_scales, "
    "int out_features, int group, str table",
    triton_vectors_matmul,
    "CUDA",
    weight="Tensor indices, Tensor codebook",
    fake=_fake_of_vectors,
)
