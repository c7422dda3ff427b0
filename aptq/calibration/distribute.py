"""Work shared over ranks: who owns a layer, how sums and codes travel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from aptq.api import AptqError, Curvature, CurvatureSum

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def assign_owners(sums: Mapping[str, CurvatureSum], world_size: int) -> dict[str, int]:
    """Give each layer an owner rank: layers that share their sums stay together, the dearest go out first.

    The price of a set of sums is one factorization, ``heads * in^3``. The result is the same on every rank.
    """
    members: dict[int, list[str]] = {}
    for name, total in sums.items():
        members.setdefault(id(total), []).append(name)
    load = [0.0] * world_size
    owners: dict[str, int] = {}
    for names in sorted(members.values(), key=lambda names: -_price(sums[names[0]])):
        owner = load.index(min(load))
        load[owner] += _price(sums[names[0]])
        owners.update(dict.fromkeys(names, owner))
    return owners


def _price(total: CurvatureSum) -> float:
    heads, width, _ = total.column.shape
    return float(heads * width**3)


def reduce_to_owners(
    sums: Mapping[str, CurvatureSum], owners: Mapping[str, int], total_tokens: int, fabric: Fabric
) -> dict[str, Curvature]:
    """Add the sums of all ranks on their owners and divide by the tokens that the *block* saw on all ranks.

    Dividing by the block's tokens, not the layer's, keeps a seldom used expert as cheap as it is. Each shared sum
    gives one shared ``Curvature``. Returns the curvatures that this rank owns.

    Raises:
        AptqError: when sums are not finite; names the layer.
    """
    done: dict[int, Curvature | None] = {}
    curvatures: dict[str, Curvature] = {}
    for name, total in sums.items():
        if id(total) not in done:
            done[id(total)] = _reduce(name, total, owners[name], total_tokens, fabric)
        curvature = done[id(total)]
        if curvature is not None:
            curvatures[name] = curvature
    return curvatures


def _reduce(name: str, total: CurvatureSum, owner: int, total_tokens: int, fabric: Fabric) -> Curvature | None:
    tokens = torch.tensor(total.tokens, device=total.column.device)
    if fabric.world_size > 1:
        dist.reduce(total.column, dst=owner)
        dist.reduce(tokens, dst=owner)
        if total.row is not None:
            dist.reduce(total.row, dst=owner)
        if total.drift is not None:
            dist.reduce(total.drift, dst=owner)
    if fabric.global_rank != owner:
        return None
    if not all_finite(total.column) or (total.drift is not None and not all_finite(total.drift)):
        raise AptqError(
            f"Calibration of {name} gave NaN or Inf. If the model is stored in float16, try model.dtype=bfloat16 or "
            "float32; otherwise the model's weights are not finite."
        )
    row = None if total.row is None else total.row / total_tokens
    drift = None if total.drift is None else total.drift.div_(total_tokens)
    return Curvature(column=total.column.div_(total_tokens), tokens=int(tokens), row=row, drift=drift)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN or Inf: neither is lost in a sum, which takes no memory."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float64)))


def broadcast_tensors(
    tensors: Mapping[str, Tensor] | None,
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    owner: int,
    fabric: Fabric,
) -> dict[str, Tensor]:
    """Send an owner's packed tensors to all ranks; others pass None and get tensors of the layout's shapes."""
    if fabric.world_size == 1:
        if tensors is None:
            raise RuntimeError("The only rank owns every layer.")
        return dict(tensors)
    received = {}
    for name, (shape, dtype) in layout.items():
        tensor = (
            torch.empty(shape, dtype=dtype, device=fabric.device) if tensors is None else tensors[name].contiguous()
        )
        dist.broadcast(tensor, src=owner)
        received[name] = tensor
    return received
