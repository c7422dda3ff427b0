"""The backend for 4 bits that is torch's own: its operator for integer weights under bfloat16 activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aptq import packing
from aptq.api import LayerSpec
from aptq.backends.planar import refuses_groups
from aptq.backends.torch_operators import refuses_integers, refuses_operator

_GROUPS = (32, 64, 128, 256)  # that the operator is written for
_OUTPUTS = 16  # of which it takes a multiple on a CPU; on a GPU 8
_CAPABILITY = (8, 0)  # of the oldest GPUs that it is compiled for
_TILE = 16  # inputs of a tile on a GPU; 2, 4 or 8 tiles lie together


@dataclass(frozen=True)
class TorchInt4:
    """Multiply integers of 4 bits by torch's ``_weight_int4pack_mm``, under bfloat16 activations.

    It takes weights as ``(code - 8) * scale + shift``, with both in bfloat16: scales of another dtype are rounded, by
    at most 2^-9 of themselves, and so is ``shift = (8 - zero) * scale``, which is 0 for symmetric integers. Sums are
    float32. The product is as good as that of weights rounded to bfloat16, and no better.
    """

    @property
    def priority(self) -> int:
        """Behind our own kernels, which are as exact as the activations, before ``reference``."""
        return 30

    def refuses(self, spec: LayerSpec) -> str | None:
        """Refuse other devices, dtypes, bits, groups and codes, and a torch without the operator."""
        on_gpu = spec.device.type == "cuda"
        operator = "_weight_int4pack_mm" if on_gpu else "_weight_int4pack_mm_for_cpu"
        if (reason := refuses_operator(spec, operator)) is not None:
            return reason
        if on_gpu and (torch.version.cuda is None or torch.cuda.get_device_capability(spec.device) < _CAPABILITY):
            return "it needs an NVIDIA GPU of compute capability 8.0 or more (Ampere)"
        return self.refuses_layer(spec)

    def refuses_layer(self, spec: LayerSpec) -> str | None:
        """Say what of a layer the operator does not take, on whatever device."""
        if (reason := refuses_integers(spec, 4)) is not None:
            return reason
        if spec.out_features % _OUTPUTS:
            return f"it takes a multiple of {_OUTPUTS} outputs, not {spec.out_features}"
        return refuses_groups(spec, _GROUPS)

    def prepack(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Return the codes in the operator's own order, which depends on the machine, and ``[groups, out, 2]``."""
        codes = packing.unpack(tensors["qweight"], 4, spec.in_features)
        scales = tensors["scales"].bfloat16().float()
        shifts = torch.zeros_like(scales)
        if "qzeros" in tensors:
            shifts = (8 - packing.unpack(tensors["qzeros"], 4, spec.out_features).float()) * scales
        if spec.device.type == "cuda":
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
            inner = max(tiles for tiles in (2, 4, 8) if spec.in_features % (tiles * _TILE) == 0)
            packed = torch.ops.aten._convert_weight_to_int4pack(pairs, inner)
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1)
        return {"packed": packed, "scales_and_shifts": torch.stack([scales, shifts], -1).bfloat16()}

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """Return ``x @ W^T`` for ``x [..., in]`` in bfloat16, as ``[..., out]``."""
        on_gpu = spec.device.type == "cuda"
        multiply = torch.ops.aten._weight_int4pack_mm if on_gpu else torch.ops.aten._weight_int4pack_mm_for_cpu
        rows = x.reshape(-1, spec.in_features).contiguous()
        width = spec.option.group_width(spec.in_features)
        y: Tensor = multiply(rows, tensors["packed"], width, tensors["scales_and_shifts"])
        return y.view(*x.shape[:-1], spec.out_features)
