"""Formats whose codes stand for a fixed set of unevenly spaced levels, times a scale for each group of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from aptq import packing
from aptq.api import AptqError, Option, QuantizedWeight
from aptq.formats.grouped import GroupedGrid, check_fields, check_group, split_groups
from aptq.formats.scale_tuning import tuned_scales
from aptq.formats.scales import (
    BLOCK_SCALES,
    pack_scales,
    read_scales,
    rounded_scale,
    scale_layout,
    scale_unit,
    stored_scale,
    stored_unit,
)

_FLOATS = {3: (0.0, 1.0, 2.0, 4.0), 4: (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)}
"""Magnitudes of floating-point numbers with a sign, two bits of exponent and none or one of mantissa (e2m0, e2m1)."""
WIDTHS = {"normal": (2, 3, 4), "fp": tuple(_FLOATS)}
_SIGNS = (-1.0, 1.0)
"""Levels of 1 bit; 0 is none of them."""


@cache
def levels(code: str, bits: int, *, own_size: bool = False) -> tuple[float, ...]:
    """Return the levels of a code in rising order; the largest magnitudes are 1, and 0 is one of them.

    ``fp`` are floating-point numbers (one of their two zeros is left out), with ``own_size`` as they are: e2m1 then
    ends at 6. ``normal`` are the quantiles of a normal
    distribution that share it evenly (NF4): ``2^(bits-1)`` positive ones, one less below 0.

    Source: for ``normal``, Dettmers et al., "QLoRA" (NeurIPS 2023), appendix E, for any number of bits.
    """
    if code == "fp":
        top = 1.0 if own_size else _FLOATS[bits][-1]
        positive = [value / top for value in _FLOATS[bits]]
        return tuple([-value for value in positive[:0:-1]] + positive)
    count = 1 << bits
    end = 1 - (1 / (2 * count) + 1 / (2 * (count - 1))) / 2
    above = _quantiles(end, count // 2)
    below = _quantiles(end, count // 2 - 1)
    return tuple([-value for value in below[::-1]] + [0.0] + above)


def _quantiles(end: float, count: int) -> list[float]:
    """Return ``count`` positive quantiles, the largest one 1."""
    shares = torch.linspace(0.5, end, count + 1, dtype=torch.float64)[1:]
    values = torch.special.ndtri(shares)
    return [float(value) for value in values / values[-1]]


@dataclass(frozen=True)
class LevelFormat:
    """What ``float`` and ``asymmetric_float`` share: all but how many scales a group has."""

    group_size: int = 64
    code: str = "normal"
    scale_dtype: str = "float16"
    clip_steps: int = 8
    clip_min: float = 0.5
    finetune: bool = False

    asymmetric: ClassVar[bool]

    def __post_init__(self) -> None:
        check_fields(self.group_size, self.scale_dtype, self.clip_steps, self.clip_min)
        if self.code not in WIDTHS:
            raise AptqError(f"format.code={self.code!r} is not known; use one of {', '.join(WIDTHS)}.")

    @property
    def gains_by_transforms(self) -> bool:
        """True of normal floats, since weights in another basis are close to normal (docs/transforms.md)."""
        return self.code == "normal"

    @property
    def _widths(self) -> tuple[int, ...]:
        """Bits that there are; a scale of 1 bit is 0 where all weights are, which a power of two cannot be."""
        one = (1,) if self.code == "normal" and self.scale_dtype != "e8m0" else ()
        return (*one, *WIDTHS[self.code])

    def check(self, option: Option, shape: tuple[int, int]) -> None:
        """Raise ``AptqError`` for bits that the code has not or a meaningless group size; every shape is served."""
        del shape
        if option.bits not in self._widths:
            allowed = ", ".join(map(str, self._widths))
            raise AptqError(f"Floats with format.code={self.code} have {allowed} bits; got bits={option.bits}.")
        check_group(option)

    def fit(self, weight: Tensor, option: Option, importance: Tensor | None = None) -> LevelGrid:
        """Fit the scales to a weight ``[heads, rows, in]`` by its range in each group (see the class)."""
        groups = split_groups(weight, option)
        weights = [None] * len(groups) if importance is None else split_groups(importance, option)
        if option.bits == 1:
            return self._fit_signs(weight, groups, weights, option)
        high = torch.stack([group.amax(-1) for group in groups], dim=1).clamp(min=0)  # [heads, groups, rows]
        low = torch.stack([-group.amin(-1) for group in groups], dim=1).clamp(min=0)
        if self.asymmetric:
            # A side that no weight is on has the other's scale: error feedback may take weights there.
            low, high = torch.where(low > 0, low, high), torch.where(high > 0, high, low)
        else:
            low = high = torch.maximum(low, high)
        table = self._levels(option, weight)
        low, high = low / table[-1], high / table[-1]  # scales from here on
        unit = scale_unit(torch.maximum(low, high).max(), self.scale_dtype)
        scales = self._search(groups, weights, low, high, table, unit, option.bits)
        return LevelGrid(scales, *LevelGrid.places(weight, option), levels=table, unit=unit, format=self)

    def _fit_signs(
        self, weight: Tensor, groups: list[Tensor], weights: list[Tensor] | list[None], option: Option
    ) -> LevelGrid:
        """Fit one level a side: ``s = sum h |w| / sum h`` has the least ``sum h (|w| - s)^2``, and needs no search.

        Source: the scale of XNOR-Net (Rastegari et al. 2016), weighed.
        """
        means = []
        for group, weight_of in zip(groups, weights, strict=True):
            # What nothing excites counts alike among itself.
            counted = group.new_ones(1, 1) if weight_of is None else weight_of[:, None].to(group.dtype).clamp(min=1e-30)
            by_side = [torch.where(group < 0, counted, 0.0), torch.where(group < 0, 0.0, counted)]
            sums = [(group.abs() * side).sum(-1) for side in by_side]
            counts = [side.sum(-1) for side in by_side]
            whole = (sums[0] + sums[1]) / (counts[0] + counts[1])
            sides = [torch.where(n > 0, s / n, whole) for s, n in zip(sums, counts, strict=True)]
            means.append(sides if self.asymmetric else [whole, whole])
        exact = [torch.stack(side, dim=1) for side in zip(*means, strict=True)]
        unit = scale_unit(torch.maximum(*exact).max(), self.scale_dtype)
        stored = [stored_scale(each, self.scale_dtype, unit, option.bits) for each in exact]
        # Where a scale rounds to 0 it is 0, not one unit: there is no level of 0.
        below, above = (torch.where(to > 2 * of, 0.0, to) for of, to in zip(exact, stored, strict=True))
        places = LevelGrid.places(weight, option)
        return LevelGrid((below, above), *places, levels=self._levels(option, weight), unit=unit, format=self)

    def _levels(self, option: Option, like: Tensor) -> Tensor:
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        own_size = self.scale_dtype in BLOCK_SCALES
        table = _SIGNS if option.bits == 1 else levels(self.code, option.bits, own_size=own_size)
        return torch.tensor(table, dtype=torch.float32, device=like.device).to(dtype)

    def _search(
        self,
        groups: list[Tensor],
        weights: list[Tensor] | list[None],
        low: Tensor,
        high: Tensor,
        table: Tensor,
        unit: Tensor,
        bits: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the scales below and above 0, ``[heads, groups, rows]``, of the shrunken ranges with the least error.

        A weight's error depends on the scale of its own side alone: with two scales, each is searched by itself.
        """
        best = self._stored(low, high, unit, bits)
        if not self.clip_steps:
            return best[0], best[1]
        least = [torch.full_like(low, float("inf")) for _ in best]
        for step in range(self.clip_steps + 1):
            share = 1.0 - (1.0 - self.clip_min) * step / self.clip_steps
            tried = self._stored(low * share, high * share, unit, bits)
            errors = [torch.empty_like(low) for _ in best]
            for at, (group, weight) in enumerate(zip(groups, weights, strict=True)):
                below, above = (scale[:, at, :, None] for scale in tried)
                square = nearest(group, table, below, above)[1].sub_(group).square_()
                if weight is not None:
                    square *= weight[:, None]
                errors[0][:, at] = torch.where(group < 0, square, 0).sum(-1)
                errors[1][:, at] = torch.where(group < 0, 0, square).sum(-1)
            if not self.asymmetric:
                errors[0] += errors[1]
                errors[1] = errors[0]
            for side, error in enumerate(errors):
                better = error < least[side]
                least[side] = torch.where(better, error, least[side])
                best[side] = torch.where(better, tried[side], best[side])
        return best[0], best[1]

    def _stored(self, low: Tensor, high: Tensor, unit: Tensor, bits: int) -> list[Tensor]:
        above = stored_scale(high, self.scale_dtype, unit, bits)
        return [stored_scale(low, self.scale_dtype, unit, bits) if self.asymmetric else above, above]

    def grid(self, quantized: QuantizedWeight, option: Option) -> LevelGrid:
        """Return the grid that a stored weight lies on; see ``aptq.api.RoundableFormat``."""
        above = read_scales(quantized.parameters, self.scale_dtype)[None]
        below = above
        if self.asymmetric:
            below = read_scales(quantized.parameters, self.scale_dtype, "scales_below")[None]
        table, unit = self._levels(option, above), stored_unit(quantized.parameters)
        places = LevelGrid.places(quantized.codes[None], option)
        return LevelGrid((below, above), *places, levels=table, unit=unit, format=self)

    def dequantize(self, quantized: QuantizedWeight, option: Option) -> Tensor:
        """Return ``level * scale`` as float32 ``[out, in]``, the scale that of the level's side."""
        codes = quantized.codes.T  # [in, out]: contiguous when it comes from unpacking
        values = self._levels(option, torch.empty(0, device=codes.device))[codes.int()]
        above = read_scales(quantized.parameters, self.scale_dtype)
        below = read_scales(quantized.parameters, self.scale_dtype, "scales_below") if self.asymmetric else above
        for group, part in enumerate(values.split(option.group_width(len(codes)))):
            part.mul_(torch.where(part < 0, below[group], above[group]) if self.asymmetric else above[group])
        return values.T

    def pack(self, quantized: QuantizedWeight, option: Option) -> dict[str, Tensor]:
        """Return ``qweight`` (planar32), ``scales [groups, out]`` and, with two of them, ``scales_below``."""
        scales = {name: scale.contiguous() for name, scale in quantized.parameters.items()}
        return {"qweight": packing.pack(quantized.codes, option.bits), **scales}

    def unpack(self, tensors: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> QuantizedWeight:
        """Invert ``pack``."""
        scales = {name: tensor for name, tensor in tensors.items() if name != "qweight"}
        return QuantizedWeight(codes=packing.unpack(tensors["qweight"], option.bits, shape[1]), parameters=scales)

    def packed_layout(self, option: Option, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of the tensors that ``pack`` gives."""
        out_features, in_features = shape
        scales = scale_layout(option.num_groups(in_features), out_features, self.scale_dtype)
        return {
            "qweight": (packing.packed_shape(out_features, in_features, option.bits), torch.int32),
            **scales,
            **({"scales_below": scales["scales"]} if self.asymmetric else {}),
        }


def nearest(values: Tensor, table: Tensor, below: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and what they stand for: the nearest level, scaled by ``below`` for values below 0, else ``above``.

    Args:
        values: of any shape.
        table: ``[levels]``, rising.
        below: broadcasts to ``values``.
        above: broadcasts to ``values``.
    """
    scale = torch.where(values < 0, below, above)
    codes = torch.bucketize((values / scale).contiguous(), (table[1:] + table[:-1]) / 2)
    found = table[codes]
    return codes, found * torch.where(found < 0, below, above)  # of a sign, 0 is taken to be below


@dataclass(frozen=True, eq=False)
class LevelGrid(GroupedGrid):
    """Scales below and above 0 of one weight, and the levels that they scale."""

    levels: Tensor  # [levels], rising
    unit: Tensor  # [], of the scales
    format: LevelFormat

    def round(self, values: Tensor, position: int | slice) -> tuple[Tensor, Tensor]:
        """Round columns to the nearest level; see ``aptq.api.Grid.round``."""
        return nearest(values, self.levels, *self._at(position))

    def round_entries(self, values: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Round single weights to the nearest level; see ``aptq.api.EntryGrid``."""
        return nearest(values, self.levels, *self._of_entries(rows, positions))

    @property
    def tunes(self) -> bool:
        """Whether the format says so; see ``aptq.api.TunedGrid``."""
        return self.format.finetune

    def tuned(self, codes: Tensor, target: Tensor, hessian: Tensor) -> LevelGrid:
        """Return the grid with scales fitted to the codes; see ``aptq.api.TunedGrid``."""
        below, above = self.parameters
        levels, none = self.levels[codes.long()], self.levels.new_zeros(())
        stored = partial(rounded_scale, scale_dtype=self.format.scale_dtype, unit=self.unit)
        if not self.format.asymmetric:
            (found,) = tuned_scales([above], [levels], self.group, target, hessian, stored)
            return replace(self, parameters=(found, found))
        sides = [torch.where(levels < 0, levels, none), torch.where(levels < 0, none, levels)]
        return replace(self, parameters=tuple(tuned_scales([below, above], sides, self.group, target, hessian, stored)))

    def finish(self, codes: Tensor) -> QuantizedWeight:
        """Bind codes ``[heads, in, rows]`` to the scales, columns back in their natural order."""
        name, unit = self.format.scale_dtype, self.unit
        below, above = (pack_scales(self._stored(scale), name, unit) for scale in self.parameters)
        parameters = {**above, **({"scales_below": below["scales"]} if self.format.asymmetric else {})}
        return QuantizedWeight(codes=self._natural(codes), parameters=parameters)
