"""The backend that everything else is compared with: dequantize, then multiply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from aptq.api import LayerSpec


@dataclass(frozen=True)
class Reference:
    """Dequantize in float32, cast to the dtype of the activations, multiply: any format, inputs, device and dtype.

    Every call makes the dense weight anew, so it saves memory at rest and costs time.
    """

    @property
    def priority(self) -> int:
        """The last resort."""
        return 0

    @property
    def quantizes_activations(self) -> bool:
        """Yes."""
        return True

    def refuses(self, spec: LayerSpec) -> str | None:
        """Refuse nothing."""
        del spec
        return None

    def prepack(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Return the checkpoint's own tensors."""
        del spec
        return dict(tensors)

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """Return ``x @ W^T`` for ``x [..., in]``, quantized first if the spec says so, in the dtype of ``x``."""
        x = x if spec.activation is None else spec.activation.quantize(x)
        quantized = spec.format.unpack(tensors, spec.option, (spec.out_features, spec.in_features))
        return functional.linear(x, spec.format.dequantize(quantized, spec.option).to(x.dtype))
