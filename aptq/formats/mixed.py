"""Several formats in one plan: each layer is stored in the one that its option names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aptq.api import AptqError, Format, FormatSet, Grid, Option, QuantizedWeight, TransformFormat, format_of


@dataclass(frozen=True)
class Mixed:
    """A ``aptq.api.FormatSet``: ``formats`` by name, each with its own options.

    Widths that one of them does not have are offered in the others alone. ``group_size`` is the first one's; each
    format's options have its own, unless the allocator names some.
    """

    formats: Mapping[str, Format]

    def __post_init__(self) -> None:
        if not self.formats:
            raise AptqError("format.formats is empty; name one format or more, as in conf/format/mixed.yaml.")
        nested = [name for name, format in self.formats.items() if isinstance(format, FormatSet)]
        if nested:
            raise AptqError(f"format.formats.{nested[0]} is a mixture itself; list its formats here.")

    @property
    def group_size(self) -> int:
        """Group size of the first format."""
        return next(iter(self.formats.values())).group_size

    @property
    def gains_by_transforms(self) -> bool:
        """Whether each of them does: there is one basis for all."""
        return all(isinstance(each, TransformFormat) and each.gains_by_transforms for each in self.formats.values())

    def check(self, option: Option, shape: tuple[int, int]) -> None:
        """Raise ``AptqError`` when the option's format cannot store a layer of this shape so, or is not there."""
        format_of(self, option).check(option, shape)

    def fit(self, weight: Tensor, option: Option, importance: Tensor | None = None) -> Grid:
        """Fit the option's format to a weight ``[heads, rows, in]``."""
        return format_of(self, option).fit(weight, option, importance)

    def dequantize(self, quantized: QuantizedWeight, option: Option) -> Tensor:
        """Return the weight ``[out, in]`` in float32."""
        return format_of(self, option).dequantize(quantized, option)

    def pack(self, quantized: QuantizedWeight, option: Option) -> dict[str, Tensor]:
        """Return the tensors of the option's format."""
        return format_of(self, option).pack(quantized, option)

    def unpack(self, tensors: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> QuantizedWeight:
        """Invert ``pack``."""
        return format_of(self, option).unpack(tensors, option, shape)

    def packed_layout(self, option: Option, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of the tensors that ``pack`` gives."""
        return format_of(self, option).packed_layout(option, shape)
