"""The backend for 8 bits that is torch's own: its operator for a scale an output under bfloat16 activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aptq import packing
from aptq.api import LayerSpec
from aptq.backends.torch_operators import refuses_integers, refuses_operator


@dataclass(frozen=True)
class TorchInt8:
    """Multiply symmetric integers of 8 bits by torch's ``_weight_int8pack_mm``, under bfloat16 activations.

    There is one scale for an output, in bfloat16: another dtype is rounded, by at most 2^-9. Sums are float32.
    """

    @property
    def priority(self) -> int:
        """Behind our own kernels, which are as exact as the activations, before ``reference``."""
        return 30

    def refuses(self, spec: LayerSpec) -> str | None:
        """Refuse other devices, dtypes, bits, groups and codes, and a torch without the operator."""
        return refuses_operator(spec, "_weight_int8pack_mm") or self.refuses_layer(spec)

    def refuses_layer(self, spec: LayerSpec) -> str | None:
        """Say what of a layer the operator does not take, on whatever device."""
        if (reason := refuses_integers(spec, 8)) is not None:
            return reason
        if spec.option.group_width(spec.in_features) != spec.in_features:
            return f"it takes one scale for an output, not groups of {spec.option.group_size} inputs"
        if spec.out_features % 4 or spec.in_features % 16:
            # The operator does not look: it reads 16 inputs and 4 scales at once, and others crash it.
            return (
                "it takes a multiple of 16 inputs and of 4 outputs, "
                f"not {spec.in_features} inputs and {spec.out_features} outputs"
            )
        if "qzeros" in spec.format.packed_layout(spec.option, (spec.out_features, spec.in_features)):
            return "it takes symmetric integers, without zeros"
        return None

    def prepack(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Return signed codes ``[out, in]``, a byte each as in the checkpoint, and scales ``[out]``."""
        codes = packing.unpack(tensors["qweight"], 8, spec.in_features)
        return {"codes": (codes ^ 128).contiguous().view(torch.int8), "scales": tensors["scales"][0].bfloat16()}

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """Return ``x @ W^T`` for ``x [..., in]`` in bfloat16, as ``[..., out]``."""
        # A copy, since the operator's loads are aligned: of a view that begins anywhere they crash.
        rows = x.reshape(-1, spec.in_features).clone(memory_format=torch.contiguous_format)
        y: Tensor = torch.ops.aten._weight_int8pack_mm(rows, tensors["codes"], tensors["scales"])
        return y.view(*x.shape[:-1], spec.out_features)
