"""Integer grids: evenly spaced levels, one scale (and zero point) per group of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from aptq import packing
from aptq.api import AptqError, Option, QuantizedWeight

_SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Integer:
    """``w = (code - zero) * scale`` with codes of 2 to 8 bits.

    ``symmetric`` fixes the zero at ``2^(bits-1)`` and stores none; otherwise each group has a zero of ``bits`` bits and
    its range always holds 0. Scales are rounded to ``scale_dtype`` *before* codes are chosen, so that what is stored is
    what was rounded to. ``clip_steps`` > 0 searches, per group, that many smaller ranges (down to ``clip_min`` of the
    full one) for the least rounding error, each column weighed by the curvature's diagonal where there is one.
    """

    group_size: int = 64
    symmetric: bool = False
    scale_dtype: str = "float16"
    clip_steps: int = 8
    clip_min: float = 0.5

    def __post_init__(self) -> None:
        if self.scale_dtype not in _SCALE_DTYPES:
            raise AptqError(
                f"format.scale_dtype={self.scale_dtype!r} is not known; use one of {', '.join(_SCALE_DTYPES)}."
            )
        if self.group_size != -1 and self.group_size < 1:
            raise AptqError(
                f"format.group_size={self.group_size} is not allowed; use -1 (a whole row) or a positive size."
            )
        if self.clip_steps < 0 or not 0.0 < self.clip_min < 1.0:
            raise AptqError(
                f"format.clip_steps={self.clip_steps} and clip_min={self.clip_min} are not allowed; "
                "use clip_steps >= 0 and 0 < clip_min < 1."
            )

    def check(self, option: Option, shape: tuple[int, int]) -> None:
        """Raise ``AptqError`` for bits outside 2-8 or a meaningless group size; every shape is served."""
        del shape
        if not 2 <= option.bits <= 8:
            raise AptqError(f"Format integer has codes of 2 to 8 bits; got bits={option.bits}.")
        if option.group_size != -1 and option.group_size < 1:
            raise AptqError(f"A group size is -1 (a whole row) or positive; got group_size={option.group_size}.")

    def fit(self, weight: Tensor, option: Option, importance: Tensor | None = None) -> IntegerGrid:
        """Fit scales and zeros to a weight ``[heads, rows, in]`` by its range in each group (see the class)."""
        group_size = weight.shape[-1] if option.group_size == -1 else option.group_size
        groups = list(weight.split(group_size, dim=-1))  # the last one may be shorter
        low = torch.stack([group.amin(-1) for group in groups], dim=1).clamp(max=0)  # [heads, groups, rows]
        high = torch.stack([group.amax(-1) for group in groups], dim=1).clamp(min=0)
        scale, zero = self._grid(low, high, option.bits)
        if self.clip_steps:
            weights = None if importance is None else list(importance.split(group_size, dim=-1))
            scale, zero = self._search(groups, weights, low, high, option.bits)
        index = torch.arange(weight.shape[-1], device=weight.device) // group_size
        return IntegerGrid.make(scale, zero, index.expand(weight.shape[0], -1), option.bits, self)

    def _grid(self, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Return scale and zero for a range, in the dtype of the range, the scale already rounded for storage."""
        levels = (1 << bits) - 1
        span = 2 * torch.maximum(-low, high) if self.symmetric else high - low
        stored = _SCALE_DTYPES[self.scale_dtype]
        rounded = (span / levels).to(stored)
        if not bool(torch.isfinite(rounded).all()):
            raise AptqError(
                f"A weight range of {span.max().item():.3g} has no finite {self.scale_dtype} scale at {bits} bits; "
                "use format.scale_dtype=float32, or look for NaN and Inf in the model."
            )
        scale = torch.where(rounded > 0, rounded, torch.ones_like(rounded)).to(low.dtype)
        if self.symmetric:
            return scale, torch.full_like(scale, float(1 << (bits - 1)))
        return scale, torch.round(-low / scale).clamp(0, levels)

    def _search(
        self, groups: list[Tensor], weights: list[Tensor] | None, low: Tensor, high: Tensor, bits: int
    ) -> tuple[Tensor, Tensor]:
        """Return the scale and zero of the shrunken range with the least (weighted) squared error in each group."""
        best_scale, best_zero = self._grid(low, high, bits)
        best_error = torch.full_like(low, float("inf"))
        for step in range(self.clip_steps + 1):
            share = 1.0 - (1.0 - self.clip_min) * step / self.clip_steps
            scale, zero = self._grid(low * share, high * share, bits)
            error = torch.empty_like(low)
            for g, group in enumerate(groups):
                exact = (group / scale[:, g, :, None]).add_(zero[:, g, :, None])  # codes before rounding
                square = exact.round().clamp_(0, (1 << bits) - 1).sub_(exact).square_()
                error[:, g] = square.sum(-1) if weights is None else (square @ weights[g].unsqueeze(-1)).squeeze(-1)
            error *= scale.square()
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
        return best_scale, best_zero

    def dequantize(self, quantized: QuantizedWeight, option: Option) -> Tensor:
        """Return ``(code - zero) * scale`` as float32 ``[out, in]`` (a transposed view of memory ``[in, out]``)."""
        codes = quantized.codes.T.float()  # [in, out]: contiguous when it comes from unpacking
        scales = quantized.parameters["scales"].float()
        zeros = quantized.parameters["zeros"].float() if "zeros" in quantized.parameters else None
        size = codes.shape[0] if option.group_size == -1 else option.group_size
        for group, part in enumerate(codes.split(size)):
            part.sub_(float(1 << (option.bits - 1)) if zeros is None else zeros[group]).mul_(scales[group])
        return codes.T

    def pack(self, quantized: QuantizedWeight, option: Option) -> dict[str, Tensor]:
        """Return ``qweight`` (planar32), ``scales [groups, out]`` and, unless symmetric, ``qzeros``.

        Zeros ``[groups, out]`` are packed as a weight of ``groups`` outputs: int32 ``[ceil(out/32), bits, groups]``.
        """
        tensors = {
            "qweight": packing.pack(quantized.codes, option.bits),
            "scales": quantized.parameters["scales"].contiguous(),
        }
        if not self.symmetric:
            tensors["qzeros"] = packing.pack(quantized.parameters["zeros"], option.bits)
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> QuantizedWeight:
        """Invert ``pack``."""
        parameters = {"scales": tensors["scales"]}
        if not self.symmetric:
            parameters["zeros"] = packing.unpack(tensors["qzeros"], option.bits, shape[0])
        return QuantizedWeight(codes=packing.unpack(tensors["qweight"], option.bits, shape[1]), parameters=parameters)

    def packed_layout(self, option: Option, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of the tensors that ``pack`` gives."""
        out_features, in_features = shape
        groups = option.num_groups(in_features)
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "qweight": (packing.packed_shape(out_features, in_features, option.bits), torch.int32),
            "scales": ((groups, out_features), _SCALE_DTYPES[self.scale_dtype]),
        }
        if not self.symmetric:
            layout["qzeros"] = (packing.packed_shape(groups, out_features, option.bits), torch.int32)
        return layout


@dataclass(frozen=True, eq=False)
class IntegerGrid:
    """Scales and zeros of one weight.

    They are expanded to one row of them per column before the first rounding, so that any order of columns is cheap.
    """

    scale: Tensor  # [heads, groups, rows]
    zero: Tensor  # [heads, groups, rows]
    group: Tensor  # [heads, in]: group of the column at each position
    order: Tensor  # [heads, in]: column at each position
    bits: int
    format: Integer

    @classmethod
    def make(cls, scale: Tensor, zero: Tensor, group: Tensor, bits: int, format: Integer) -> IntegerGrid:
        """Make the grid in the natural order of columns."""
        order = torch.arange(group.shape[1], device=group.device).expand_as(group)
        return cls(scale, zero, group, order, bits=bits, format=format)

    def permuted(self, order: Tensor) -> IntegerGrid:
        """Return the grid with position ``j`` of head ``h`` being this grid's column ``order[h, j]``."""
        return replace(self, group=self.group.gather(1, order), order=self.order.gather(1, order))

    @cached_property
    def _columns(self) -> tuple[Tensor, Tensor]:
        """Scale and zero ``[heads, in, rows]`` of each position's column."""
        head = torch.arange(self.group.shape[0], device=self.group.device)[:, None]
        return self.scale[head, self.group], self.zero[head, self.group]

    @cached_property
    def _by_position(self) -> list[tuple[Tensor, Tensor]]:
        """The same, ``[heads, rows]`` for each position: picking from a list is cheaper than from a tensor."""
        scale, zero = self._columns
        return list(zip(scale.unbind(1), zero.unbind(1), strict=True))

    def round(self, values: Tensor, position: int | slice) -> tuple[Tensor, Tensor]:
        """Round columns to the nearest level; see ``aptq.api.Grid.round``."""
        if isinstance(position, int):
            scale, zero = self._by_position[position]
        else:
            scale, zero = (each[:, position] for each in self._columns)
        return self._nearest(values, scale, zero)

    def round_entries(self, values: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Round single weights to the nearest level; see ``aptq.api.EntryGrid``."""
        head = torch.arange(values.shape[0], device=values.device)[:, None]
        scale, zero = (each[head, positions, rows] for each in self._columns)
        return self._nearest(values, scale, zero)

    def _nearest(self, values: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        codes = torch.addcdiv(zero, values, scale).round_().clamp_(0, (1 << self.bits) - 1)
        return codes, (codes - zero).mul_(scale)

    def finish(self, codes: Tensor) -> QuantizedWeight:
        """Bind codes ``[heads, in, rows]`` to the parameters, columns back in their natural order."""
        heads, in_features, rows = codes.shape
        head = torch.arange(heads, device=codes.device)[:, None]
        natural = torch.empty(heads, in_features, rows, dtype=torch.uint8, device=codes.device)
        natural[head, self.order] = codes.to(torch.uint8)
        stored = _SCALE_DTYPES[self.format.scale_dtype]
        parameters = {"scales": self.scale.transpose(0, 1).reshape(-1, heads * rows).to(stored)}  # [groups, out]
        if not self.format.symmetric:
            parameters["zeros"] = self.zero.transpose(0, 1).reshape(-1, heads * rows).to(torch.uint8)
        return QuantizedWeight(codes=natural.permute(0, 2, 1).reshape(heads * rows, in_features), parameters=parameters)
