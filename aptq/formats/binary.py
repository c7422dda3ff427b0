"""Binarized weights: a sign and a scale, a second sign or a split into small and large where it pays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aptq import packing
from aptq.api import AptqError, Option, QuantizedWeight
from aptq.formats.binary_scales import one_scale, residual_scales, split_scales
from aptq.formats.grouped import GroupedGrid, check_group, index_dtype
from aptq.formats.scales import FLOATS, stored_scale

SALIENT = "salient"
"""Inputs that are salient, rising, int16 (int32 above 32767 inputs) ``[count]``, among the parameters."""

Scales = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_SALIENT_SCALES: dict[str, Scales] = {"split": split_scales, "two_pass": residual_scales}
_AT_ONCE = 1 << 22
"""Weights that scales are fitted to at once, in float64."""

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Binary:
    """``w = mean -+ low`` or ``mean -+ high``: a sign, and where it pays a second bit for which of two scales.

    The ``salient`` share of a layer's inputs, those of the largest ``h_j sum_i w_ij^2``, have both scales; ``h_j`` is
    the importance of the input (1 without one), ``1 / U_jj^2`` under quantizers that feed errors back. They are one
    group, so that their scales are of an output. Of the other inputs, ``group_size`` neighbours (-1: all) are a group,
    which has both scales at 2 bits and ``low`` alone at 1 bit: there salient inputs take their second bit on top. A
    weight has the nearest of its values.

    Scales have the least squared error weighed by ``h_j``: one is the mean magnitude, two are those of the best break
    point between small and large magnitudes (``salient_scales="split"``). ``two_pass`` has those of salient inputs by
    binarizing twice, as published: the values ``-+ a1 -+ a2`` are four of the same kind. ``centre`` takes the mean of
    each group off first, which is stored; without it, it is 0. ``refits`` runs of quantizers that feed errors back are
    made on scales fitted to the columns as they were met in the run before.

    Stored for a layer ``[out, in]`` are ``signs``, a bit a weight; ``magnitudes``, a bit for each weight that has two
    scales; ``scales``, ``scales_high`` and ``means`` in ``scale_dtype`` for each output and group that has them; and
    ``salient``, two bytes for each such input. All of it counts.

    Source: Huang et al., "BiLLM: Pushing the Limit of Post-Training Quantization for LLMs" (ICML 2024, arXiv
    2402.04291), whose 1.09 bits a weight have neither the bit that tells the sides of the break point apart nor scales.
    What is changed is in docs/formats.md.
    """

    group_size: int = -1
    salient: float = 0.05
    salient_scales: str = "split"
    centre: bool = False
    refits: int = 1
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        check_group(Option(bits=1, group_size=self.group_size))
        if not 0.0 <= self.salient <= 1.0:
            raise AptqError(f"format.salient={self.salient} is not allowed; it is a share of the inputs from 0 to 1.")
        if self.salient_scales not in _SALIENT_SCALES:
            allowed = ", ".join(_SALIENT_SCALES)
            raise AptqError(f"format.salient_scales={self.salient_scales!r} is not known; use one of {allowed}.")
        if self.refits < 0:
            raise AptqError(f"format.refits={self.refits} is not allowed; use 0 (none) or more.")
        if self.scale_dtype not in FLOATS:
            raise AptqError(f"format.scale_dtype={self.scale_dtype!r} is not known; use one of {', '.join(FLOATS)}.")

    def check(self, option: Option, shape: tuple[int, int]) -> None:
        """Raise ``AptqError`` for bits other than 1 and 2 or a meaningless group size; every shape is served."""
        del shape
        if option.bits not in (1, 2):
            raise AptqError(f"Format binary has codes of 1 or 2 bits; got bits={option.bits}.")
        check_group(option)

    def _count(self, in_features: int) -> int:
        return round(self.salient * in_features)

    def fit(self, weight: Tensor, option: Option, importance: Tensor | None = None) -> BinaryGrid:
        """Choose the salient inputs of a weight ``[heads, rows, in]``, and fit means and scales.

        Raises:
            AptqError: a scale that is not finite.
        """
        heads, _, width = weight.shape
        counted = weight.new_ones(heads, width, dtype=torch.float64) if importance is None else importance.double()
        # Differences of sums must know the least; what nothing excites counts alike among itself.
        counted = torch.maximum(counted, 1e-9 * counted.amax(1, keepdim=True)).clamp(min=1e-30)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).square()  # [heads, in]
        salient = (squares * counted).sum(0).topk(self._count(width)).indices.sort().values
        tables = self._fit_scales(weight, _groups(salient, option, width), option, counted)
        return BinaryGrid.around(tables, salient, self, option, counted)

    def _fit_scales(
        self, weight: Tensor, groups: Sequence[Tensor], option: Option, counted: Tensor
    ) -> tuple[Tensor, ...]:
        """Return means and both scales ``[heads, groups, rows]``, as they are stored."""
        others = split_scales if option.bits == 2 else one_scale
        kinds = [others] * option.num_groups(weight.shape[-1]) + [_SALIENT_SCALES[self.salient_scales]]
        fitted = [
            self._fit_group(weight[..., columns], counted[:, None, columns], scales, option.bits)
            for columns, scales in zip(groups, kinds, strict=False)  # there may be no salient ones
        ]
        return tuple(torch.stack(each, dim=1) for each in zip(*fitted, strict=True))

    def _fit_group(self, weight: Tensor, counted: Tensor, scales: Scales, bits: int) -> tuple[Tensor, ...]:
        """Return mean and both scales ``[heads, rows]`` of the inputs of one group, all of which may be salient."""
        if not weight.shape[-1]:
            return (weight.sum(-1),) * 3
        parts = []
        for part in weight.split(max(_AT_ONCE // weight.shape[-1], 1), dim=1):
            exact = part.double()
            mean = (exact * counted).sum(-1) / counted.sum(-1) if self.centre else torch.zeros_like(exact[..., 0])
            mean = mean.to(FLOATS[self.scale_dtype]).double()
            low, high = scales((exact - mean[..., None]).abs(), counted)
            parts.append((mean, self._stored_scale(low, bits), self._stored_scale(high, bits)))
        return tuple(torch.cat(each, dim=1).to(weight.dtype) for each in zip(*parts, strict=True))

    def _stored_scale(self, scale: Tensor, bits: int) -> Tensor:
        stored = stored_scale(scale, self.scale_dtype, torch.ones((), device=scale.device), bits)
        return torch.where(stored > 2 * scale, 0.0, stored)  # where it rounds to 0 it is 0, not one unit

    def dequantize(self, quantized: QuantizedWeight, option: Option) -> Tensor:
        """Return the weight in float32 ``[out, in]`` (a transposed view of memory ``[in, out]``)."""
        codes = quantized.codes.T
        weight = torch.empty(codes.shape, device=codes.device)
        tables = self._tables(quantized.parameters)
        for at, columns in enumerate(_groups(quantized.parameters[SALIENT].long(), option, len(codes))):
            weight[columns] = _value(codes[columns].int(), *(table[at] for table in tables))
        return weight.T

    def _tables(self, stored: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return means, low and high scales, float32 ``[groups, out]`` each."""
        low, high = stored["scales"].float(), stored["scales_high"].float()
        mean = stored["means"].float() if self.centre else torch.zeros_like(low)
        return mean, low, torch.cat([low[: len(low) - len(high)], high])

    def grid(self, quantized: QuantizedWeight, option: Option) -> BinaryGrid:
        """Return the grid that a stored weight lies on; see ``aptq.api.RoundableFormat``."""
        tables = tuple(each[None] for each in self._tables(quantized.parameters))
        width = quantized.codes.shape[1]
        counted = torch.ones(1, width, dtype=torch.float64, device=quantized.codes.device)
        return BinaryGrid.around(tables, quantized.parameters[SALIENT].long(), self, option, counted)

    def pack(self, quantized: QuantizedWeight, option: Option) -> dict[str, Tensor]:
        """Return ``signs`` and ``magnitudes`` (planar32, 1 bit), the parameters, and which inputs are salient."""
        codes = quantized.codes
        two = _with_two(quantized.parameters[SALIENT].long(), option, codes.shape[1])
        return {
            "signs": packing.pack(codes & 1, 1),
            "magnitudes": packing.pack(codes[:, two] >> 1, 1),
            **{name: each.contiguous() for name, each in quantized.parameters.items()},
        }

    def unpack(self, tensors: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> QuantizedWeight:
        """Invert ``pack``."""
        codes = packing.unpack(tensors["signs"], 1, shape[1]).T
        two = _with_two(tensors[SALIENT].long(), option, shape[1])
        codes[two] |= packing.unpack(tensors["magnitudes"], 1, len(two)).T << 1
        parameters = {name: each for name, each in tensors.items() if name not in ("signs", "magnitudes")}
        return QuantizedWeight(codes=codes.T, parameters=parameters)

    def packed_layout(self, option: Option, shape: tuple[int, int]) -> Layout:
        """Return shape and dtype of the tensors that ``pack`` gives."""
        out_features, in_features = shape
        count, groups = self._count(in_features), option.num_groups(in_features)
        both = option.bits == 2
        scales = ((groups + bool(count), out_features), FLOATS[self.scale_dtype])
        return {
            "signs": (packing.packed_shape(out_features, in_features, 1), torch.int32),
            "magnitudes": (packing.packed_shape(out_features, in_features if both else count, 1), torch.int32),
            **({"means": scales} if self.centre else {}),
            "scales": scales,
            "scales_high": ((groups * both + bool(count), out_features), scales[1]),
            SALIENT: ((count,), index_dtype(in_features)),
        }


@dataclass(frozen=True, eq=False)
class BinaryGrid(GroupedGrid):
    """Means and scales of the groups of one weight, of which salient inputs are the last."""

    salient: Tensor  # [count], int64, rising
    format: Binary
    option: Option
    counted: Tensor  # [heads, in], in the natural order: weights of squared errors
    refits: int  # that are left

    @classmethod
    def around(
        cls, tables: tuple[Tensor, ...], salient: Tensor, format: Binary, option: Option, counted: Tensor
    ) -> BinaryGrid:
        """Return the grid of means and scales ``[heads, groups, rows]``, columns in their natural order."""
        group = torch.empty(counted.shape, dtype=torch.int64, device=counted.device)
        for at, columns in enumerate(_groups(salient, option, counted.shape[1])):
            group[:, columns] = at
        order = torch.arange(counted.shape[1], device=counted.device).expand(len(counted), -1)
        return cls(tables, group, order, salient, format, option, counted, format.refits)

    def refit(self, columns: Tensor) -> BinaryGrid | None:
        """Return the grid of scales fitted to what error feedback made of the columns; see ``aptq.api.RefitGrid``."""
        if not self.refits:
            return None
        met = torch.empty_like(columns).scatter_(1, self.order.unsqueeze(-1).expand_as(columns), columns)
        groups = _groups(self.salient, self.option, columns.shape[1])
        tables = self.format._fit_scales(met.transpose(1, 2), groups, self.option, self.counted)
        return replace(self, parameters=tables, refits=self.refits - 1)

    def round(self, values: Tensor, position: int | slice) -> tuple[Tensor, Tensor]:
        """Round columns to the nearest of their values; see ``aptq.api.Grid.round``."""
        return nearest(values, *self._at(position))

    def round_entries(self, values: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Round single weights; see ``aptq.api.EntryGrid``."""
        return nearest(values, *self._of_entries(rows, positions))

    def finish(self, codes: Tensor) -> QuantizedWeight:
        """Bind codes ``[heads, in, rows]`` to means and scales, columns back in their natural order."""
        width, dtype = codes.shape[1], FLOATS[self.format.scale_dtype]
        means, low, high = (self._stored(each).to(dtype) for each in self.parameters)
        first = 0 if self.option.bits == 2 else self.option.num_groups(width)
        parameters = {
            **({"means": means} if self.format.centre else {}),
            "scales": low,
            "scales_high": high[first:].clone(),
            SALIENT: self.salient.to(index_dtype(width)),
        }
        return QuantizedWeight(codes=self._natural(codes), parameters=parameters)


def nearest(values: Tensor, mean: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and the nearest of ``mean -+ low`` and ``mean -+ high``, all broadcasting to ``values``.

    A code is 1 for a value above the mean, and 2 more where the scale is ``high``; never that where both are the same.
    """
    above = values >= mean
    small, large = (torch.where(above, mean + scale, mean - scale) for scale in (low, high))
    wide = (values - large).abs() < (values - small).abs()
    return above + 2 * wide.to(torch.uint8), torch.where(wide, large, small)


def _value(codes: Tensor, mean: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return what codes of ``nearest`` stand for."""
    scale = torch.where(codes >= 2, high, low)
    return torch.where(codes % 2 == 1, mean + scale, mean - scale)


def _groups(salient: Tensor, option: Option, width: int) -> list[Tensor]:
    """Return the inputs of each group, but for the salient ones, and where there are any those as the last group."""
    free = torch.ones(width, dtype=torch.bool, device=salient.device)
    free[salient] = False
    places = torch.arange(width, device=salient.device).split(option.group_width(width))
    return [each[free[each]] for each in places] + [salient] * bool(len(salient))


def _with_two(salient: Tensor, option: Option, width: int) -> Tensor:
    """Return the inputs whose weights have two scales."""
    return torch.arange(width, device=salient.device) if option.bits == 2 else salient
