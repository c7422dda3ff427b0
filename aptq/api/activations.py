"""Rounding what layers are called with, at run time."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class ActivationQuantizer(Protocol):
    """What quantizes a layer's inputs before they are multiplied with its weights.

    Its options are part of the checkpoint, and it needs nothing else: scales come from the inputs themselves, token by
    token, so that a token is rounded alike whatever stands around it.
    """

    def check(self, in_features: int) -> None:
        """Raise ``AptqError`` when inputs of this width cannot be quantized so; say what is allowed."""

    def quantize(self, x: Tensor) -> Tensor:
        """Return what stands for ``x [..., in]`` (floating) once it is quantized, in its shape and dtype.

        ``x`` stays as it is. A token with NaN has NaN or infinity among its outputs, and no other token has. Gradients
        pass as through the identity (straight-through).
        """
