"""A packed weight as the kernels read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

PRIMARY = {1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 4, 8: 8}
"""Width of the first plane of the codes of some bits, see ``aptq.packing``."""
MAGIC = 0x4B000000
"""The bits of the float32 2^23: with a number below it in the bits of the mantissa, that of their sum."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedWeight:
    """A weight ``[out, in]``; every tensor is contiguous and on one device."""

    qweight: Tensor  # int32 [ceil(in / 32), bits, out]
    scales: Tensor  # [groups, out], of any floating dtype
    below: Tensor | None = None  # [groups, out]: scales of levels below 0, where those have their own
    zeros: Tensor | None = None  # [groups, out], numbers of any dtype; None: every zero is 2^(bits - 1)
    levels: Tensor | None = None  # float32 [2^bits]: what codes stand for, or several such tables; None: integers
    selectors: Tensor | None = None  # int16 [ceil(in / 32), out]: of each 8 inputs four bits, which table; None: one
    scale_values: Tensor | None = None  # float32 [256]: what scales stand for, which then are bytes
    states: Tensor | None = None  # float32 [2^L]: what the last L bits of an output's and earlier ones' codes stand for
    in_features: int
    group: int  # inputs that share a scale; as many as there are, or more: all

    @property
    def kind(self) -> str:
        """Of the kernels that read it: "states", "blocks", or "" for integers and levels with floats as scales."""
        if self.states is not None:
            return "states"
        return "" if self.selectors is None and self.scale_values is None else "blocks"

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.qweight.shape[1]

    @property
    def units(self) -> int:
        """Of 32 inputs."""
        return self.qweight.shape[0]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.scales.shape[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class VectorWeight:
    """A weight ``[out, in]`` of vectors from codebooks; every tensor is contiguous and on one device."""

    indices: Tensor  # int32 [ceil(in / 32), bits, ceil(out / length)]
    codebook: Tensor  # [groups, centroids, length], of any floating dtype
    residual_indices: Tensor | None = None  # like the indices
    residual_codebook: Tensor | None = None  # [groups, centroids, length]: what is added
    row_scales: Tensor | None = None  # [ceil(out / length)]
    column_scales: Tensor | None = None  # [in]
    out_features: int
    in_features: int
    group: int  # inputs that share codebooks; as many as there are, or more: all

    kind = "vectors"
    levels = None

    @property
    def bits(self) -> int:
        """Of an index."""
        return self.indices.shape[1]

    @property
    def units(self) -> int:
        """Of 32 inputs."""
        return self.indices.shape[0]
