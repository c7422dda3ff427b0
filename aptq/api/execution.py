"""Running packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from aptq.api.activations import ActivationQuantizer
from aptq.api.model import Option
from aptq.api.rounding import Format
from aptq.api.transforms import Transform


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerSpec:
    """All that a backend needs to know of a layer to say whether it can run it."""

    out_features: int
    in_features: int
    format: Format
    format_name: str
    option: Option
    dtype: torch.dtype  # of the activations
    device: torch.device
    activation: ActivationQuantizer | None = None  # what quantizes the inputs, if anything does
    transform: Transform | None = None  # the basis of the weight, which the inputs are brought into


@runtime_checkable
class Backend(Protocol):
    """How packed weights are multiplied."""

    @property
    def priority(self) -> int:
        """``backend=auto`` tries the highest first; ``reference`` is the last, at 0."""

    def refuses(self, spec: LayerSpec) -> str | None:
        """Return why this layer cannot be run here, or None when it can."""

    def prepack(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Turn the checkpoint's tensors into what ``matmul`` reads, once, at load."""

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """Return ``x @ W^T`` for ``x [..., in]``, as ``[..., out]`` in the dtype of ``x``."""


@runtime_checkable
class ActivationBackend(Backend, Protocol):
    """A backend that may quantize the inputs: ``matmul`` then gives ``spec.activation.quantize(x) @ W^T``.

    One that does not say so is never given a layer with quantized inputs.
    """

    @property
    def quantizes_activations(self) -> bool:
        """Whether it does; what it cannot, ``refuses`` still refuses."""


@runtime_checkable
class TransformBackend(Backend, Protocol):
    """A backend that may transform the inputs: ``matmul`` then gives ``spec.transform.apply(x) @ W^T``.

    Of one that does not say so, or not for a layer, ``matmul`` is given inputs that are in the weight's basis.
    """

    def transforms(self, spec: LayerSpec) -> bool:
        """Return whether it does for a layer with a transform that it does not refuse."""


def transforms_inputs(backend: Backend, spec: LayerSpec) -> bool:
    """Return whether a backend transforms a layer's inputs itself; False where there is no transform."""
    return spec.transform is not None and isinstance(backend, TransformBackend) and backend.transforms(spec)
