"""Changing the basis of what layers are called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Transform(Protocol):
    """An orthogonal matrix ``T [in, in]`` for each width of inputs, and so a layer ``x W^T = (x T)(W T)^T``.

    ``W T`` is what is rounded and stored, ``x T`` what it is multiplied with at run time. The transform's options are
    part of the checkpoint, and it needs nothing else: objects with equal options have the same ``T``, on any machine.
    """

    def check(self, in_features: int) -> None:
        """Raise ``AptqError`` when there is no ``T`` of this width; say what is allowed."""

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x T`` for ``x [..., in]`` (floating), in its shape and dtype; ``x`` stays as it is.

        Each row by itself; gradients pass through. float64 is computed in float64, all else in float32.
        """

    def invert(self, x: Tensor) -> Tensor:
        """Return ``x T^T`` likewise: ``invert(apply(x))`` is ``x`` but for rounding."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Rotation:
    """``T = D (C (x) H)``, for those who apply it themselves: ``H`` is the Hadamard matrix of entries 1 and -1.

    With ``in = parts * 2^k``, row by row: ``x * signs`` as ``[parts, 2^k]``, times ``H`` from the right, times ``C``
    from the left.
    """

    signs: Tensor  # float32 [in]: D
    matrix: Tensor  # float32 [parts, parts], symmetric and contiguous: C, with the norm that makes T orthogonal


@runtime_checkable
class RotationTransform(Transform, Protocol):
    """A transform that is a ``Rotation``; backends that know those apply it in the same call as the product."""

    def rotation(self, in_features: int) -> Rotation:
        """Return ``T`` of a width that ``check`` allows, on the CPU."""
