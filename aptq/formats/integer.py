"""Integer grids: evenly spaced levels, one scale (and zero point) per group of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from aptq import packing
from aptq.api import AptqError, Option, QuantizedWeight
from aptq.formats.grouped import GroupedGrid, check_fields, check_group, split_groups
from aptq.formats.scale_tuning import tuned_scales
from aptq.formats.scales import (
    pack_scales,
    read_scales,
    rounded_scale,
    scale_layout,
    scale_unit,
    stored_scale,
    stored_unit,
)

_CLIPS = ("shared", "asymmetric", "joint")


@dataclass(frozen=True)
class Integer:
    """``w = (code - zero) * scale`` with codes of 2 to 8 bits.

    ``symmetric`` fixes the zero at ``2^(bits-1)`` and stores none; otherwise each group has a zero of ``bits`` bits and
    its range always holds 0. Scales are rounded to ``scale_dtype`` *before* codes are chosen, so that what is stored is
    what was rounded to. ``clip_steps`` > 0 searches, per group, that many smaller ranges (down to ``clip_min`` of the
    full one) for the least rounding error, each column weighed by the curvature's diagonal where there is one. With
    ``clip="shared"`` both ends of the range shrink alike; ``clip="asymmetric"`` then searches each end by itself, in
    three times the time; ``clip="joint"`` tries every pair of ends, in ``clip_steps + 1`` times the time (BitDistiller,
    ACL 2024, section 3.1, there on the outputs of the group for the inputs themselves). ``finetune`` fits the scales
    once more when codes are chosen, all of a row together, to the least error of the layer (``scale_tuning``).
    """

    group_size: int = 64
    symmetric: bool = False
    scale_dtype: str = "float16"
    clip_steps: int = 8
    clip_min: float = 0.5
    clip: str = "shared"
    finetune: bool = False

    def __post_init__(self) -> None:
        check_fields(self.group_size, self.scale_dtype, self.clip_steps, self.clip_min)
        if self.clip not in _CLIPS:
            raise AptqError(f"format.clip={self.clip!r} is not known; use one of {', '.join(_CLIPS)}.")

    @property
    def gains_by_transforms(self) -> bool:
        """True: evenly spaced levels suit rows without outliers (docs/transforms.md)."""
        return True

    def check(self, option: Option, shape: tuple[int, int]) -> None:
        """Raise ``AptqError`` for bits outside 2-8 or a meaningless group size; every shape is served."""
        del shape
        if not 2 <= option.bits <= 8:
            raise AptqError(f"Format integer has codes of 2 to 8 bits; got bits={option.bits}.")
        check_group(option)

    def fit(self, weight: Tensor, option: Option, importance: Tensor | None = None) -> IntegerGrid:
        """Fit scales and zeros to a weight ``[heads, rows, in]`` by its range in each group (see the class)."""
        groups = split_groups(weight, option)
        low = torch.stack([group.amin(-1) for group in groups], dim=1).clamp(max=0)  # [heads, groups, rows]
        high = torch.stack([group.amax(-1) for group in groups], dim=1).clamp(min=0)
        unit = scale_unit((self._span(low, high) / ((1 << option.bits) - 1)).max(), self.scale_dtype)
        scale, zero = self._grid(low, high, unit, option.bits)
        if self.clip_steps:
            weights = None if importance is None else split_groups(importance, option)
            scale, zero = self._search(groups, weights, low, high, unit, option.bits)
        return IntegerGrid((scale, zero), *IntegerGrid.places(weight, option), unit=unit, bits=option.bits, format=self)

    def _span(self, low: Tensor, high: Tensor) -> Tensor:
        return 2 * torch.maximum(-low, high) if self.symmetric else high - low

    def _grid(self, low: Tensor, high: Tensor, unit: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Return scale and zero for a range, in the dtype of the range, the scale already rounded for storage."""
        levels = (1 << bits) - 1
        scale = stored_scale(self._span(low, high) / levels, self.scale_dtype, unit, bits)
        if self.symmetric:
            return scale, torch.full_like(scale, float(1 << (bits - 1)))
        return scale, torch.round(-low / scale).clamp(0, levels)

    def _search(
        self, groups: list[Tensor], weights: list[Tensor] | None, low: Tensor, high: Tensor, unit: Tensor, bits: int
    ) -> tuple[Tensor, Tensor]:
        """Return the scale and zero of the range with the least (weighted) squared error in each group.

        First both ends shrink alike; with ``clip="asymmetric"`` each end is then searched with the other one in place,
        and ``clip="joint"`` goes through all pairs instead.
        """
        shares = [1.0 - (1.0 - self.clip_min) * step / self.clip_steps for step in range(self.clip_steps + 1)]
        best = _Range(low, high, *self._grid(low, high, unit, bits), error=torch.full_like(low, float("inf")))
        if self.clip == "joint" and not self.symmetric:
            for bottom, top in product(shares, shares):
                best = best.or_better(self._range(groups, weights, low * bottom, high * top, unit, bits))
            return best.scale, best.zero
        for share in shares:
            best = best.or_better(self._range(groups, weights, low * share, high * share, unit, bits))
        if self.clip == "asymmetric" and not self.symmetric:
            high_end = best.high
            for share in shares:
                best = best.or_better(self._range(groups, weights, low * share, high_end, unit, bits))
            low_end = best.low
            for share in shares:
                best = best.or_better(self._range(groups, weights, low_end, high * share, unit, bits))
        return best.scale, best.zero

    def _range(
        self, groups: list[Tensor], weights: list[Tensor] | None, low: Tensor, high: Tensor, unit: Tensor, bits: int
    ) -> _Range:
        """Return what rounding within a range costs."""
        scale, zero = self._grid(low, high, unit, bits)
        error = torch.empty_like(low)
        for g, group in enumerate(groups):
            exact = (group / scale[:, g, :, None]).add_(zero[:, g, :, None])  # codes before rounding
            square = exact.round().clamp_(0, (1 << bits) - 1).sub_(exact).square_()
            error[:, g] = square.sum(-1) if weights is None else (square @ weights[g].unsqueeze(-1)).squeeze(-1)
        return _Range(low, high, scale, zero, error=error.mul_(scale.square()))

    def grid(self, quantized: QuantizedWeight, option: Option) -> IntegerGrid:
        """Return the grid that a stored weight lies on; see ``aptq.api.RoundableFormat``."""
        scale = read_scales(quantized.parameters, self.scale_dtype)[None]
        middle = torch.full_like(scale, float(1 << (option.bits - 1)))
        zero = middle if self.symmetric else quantized.parameters["zeros"].to(scale)[None]
        unit = stored_unit(quantized.parameters)
        places = IntegerGrid.places(quantized.codes[None], option)
        return IntegerGrid((scale, zero), *places, unit=unit, bits=option.bits, format=self)

    def dequantize(self, quantized: QuantizedWeight, option: Option) -> Tensor:
        """Return ``(code - zero) * scale`` as float32 ``[out, in]`` (a transposed view of memory ``[in, out]``)."""
        codes = quantized.codes.T.float()  # [in, out]: contiguous when it comes from unpacking
        scales = read_scales(quantized.parameters, self.scale_dtype)
        zeros = quantized.parameters["zeros"].float() if "zeros" in quantized.parameters else None
        width = option.group_width(len(codes))
        whole = len(codes) // width
        parts = [codes[: whole * width].view(whole, width, codes.shape[1])]  # all groups at once, but for a shorter one
        if len(codes) % width:
            parts.append(codes[whole * width :][None])
        for part, at in zip(parts, (slice(whole), slice(whole, None)), strict=False):
            part.sub_(float(1 << (option.bits - 1)) if zeros is None else zeros[at, None]).mul_(scales[at, None])
        return codes.T

    def pack(self, quantized: QuantizedWeight, option: Option) -> dict[str, Tensor]:
        """Return ``qweight`` (planar32), ``scales [groups, out]`` and, unless symmetric, ``qzeros``.

        Zeros ``[groups, out]`` are packed as a weight of ``groups`` outputs: int32 ``[ceil(out/32), bits, groups]``.
        """
        scales = {name: tensor.contiguous() for name, tensor in quantized.parameters.items() if name != "zeros"}
        tensors = {"qweight": packing.pack(quantized.codes, option.bits), **scales}
        if not self.symmetric:
            tensors["qzeros"] = packing.pack(quantized.parameters["zeros"], option.bits)
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> QuantizedWeight:
        """Invert ``pack``."""
        parameters = {name: tensor for name, tensor in tensors.items() if name not in ("qweight", "qzeros")}
        if not self.symmetric:
            parameters["zeros"] = packing.unpack(tensors["qzeros"], option.bits, shape[0])
        return QuantizedWeight(codes=packing.unpack(tensors["qweight"], option.bits, shape[1]), parameters=parameters)

    def unpack_rows(
        self, tensors: Mapping[str, Tensor], option: Option, rows: Tensor, in_features: int
    ) -> QuantizedWeight:
        """Invert ``pack`` for some rows alone; see ``aptq.api.RowFormat``."""
        parameters = {
            name: tensor.index_select(-1, rows) if tensor.ndim > 1 else tensor  # a unit is of all scales
            for name, tensor in tensors.items()
            if name not in ("qweight", "qzeros")
        }
        if not self.symmetric:
            parameters["zeros"] = packing.unpack_inputs(tensors["qzeros"], option.bits, rows)
        codes = packing.unpack_few(tensors["qweight"].index_select(-1, rows), option.bits, in_features)
        return QuantizedWeight(codes=codes, parameters=parameters)

    def packed_layout(self, option: Option, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of the tensors that ``pack`` gives."""
        out_features, in_features = shape
        groups = option.num_groups(in_features)
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "qweight": (packing.packed_shape(out_features, in_features, option.bits), torch.int32),
            **scale_layout(groups, out_features, self.scale_dtype),
        }
        if not self.symmetric:
            layout["qzeros"] = (packing.packed_shape(groups, out_features, option.bits), torch.int32)
        return layout


@dataclass(frozen=True, eq=False)
class _Range:
    """A range for each group, ``[heads, groups, rows]``, its grid, and what rounding to it costs."""

    low: Tensor
    high: Tensor
    scale: Tensor
    zero: Tensor
    error: Tensor

    def or_better(self, other: _Range) -> _Range:
        """Return the better one of each group; this one where they are equal."""
        better = other.error < self.error
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Range(*(torch.where(better, theirs, mine) for mine, theirs in pairs))


@dataclass(frozen=True, eq=False)
class IntegerGrid(GroupedGrid):
    """Scales and zeros of one weight."""

    unit: Tensor  # [], of the scales
    bits: int
    format: Integer

    def round(self, values: Tensor, position: int | slice) -> tuple[Tensor, Tensor]:
        """Round columns to the nearest level; see ``aptq.api.Grid.round``."""
        return self._nearest(values, *self._at(position))

    def round_entries(self, values: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Round single weights to the nearest level; see ``aptq.api.EntryGrid``."""
        return self._nearest(values, *self._of_entries(rows, positions))

    def _nearest(self, values: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        codes = torch.addcdiv(zero, values, scale).round_().clamp_(0, (1 << self.bits) - 1)
        return codes, (codes - zero).mul_(scale)

    @property
    def tunes(self) -> bool:
        """Whether the format says so; see ``aptq.api.TunedGrid``."""
        return self.format.finetune

    def tuned(self, codes: Tensor, target: Tensor, hessian: Tensor) -> IntegerGrid:
        """Return the grid with scales fitted to the codes; see ``aptq.api.TunedGrid``."""
        scale, zero = self.parameters
        levels = codes - self._columns[1]
        stored = partial(rounded_scale, scale_dtype=self.format.scale_dtype, unit=self.unit)
        (found,) = tuned_scales([scale], [levels], self.group, target, hessian, stored)
        return replace(self, parameters=(found, zero))

    def finish(self, codes: Tensor) -> QuantizedWeight:
        """Bind codes ``[heads, in, rows]`` to the parameters, columns back in their natural order."""
        scale, zero = self.parameters
        parameters = pack_scales(self._stored(scale), self.format.scale_dtype, self.unit)
        if not self.format.symmetric:
            parameters["zeros"] = self._stored(zero).to(torch.uint8)
        return QuantizedWeight(codes=self._natural(codes), parameters=parameters)
