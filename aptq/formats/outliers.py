"""Another format with its worst weights kept in 16 bits: a dense matrix of codes and a sparse one of values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from aptq.api import AptqError, EntryGrid, Format, FormatSet, Option, QuantizedWeight, RoundableFormat
from aptq.formats.grouped import by_output, coded_apart, index_dtype, split_groups
from aptq.formats.scales import FLOATS

_AROUND = "outliers"
_VALUE_DTYPES = ("float16", "bfloat16")
_FIRST = 1 << 16
"""Codes from here on are outliers, their 16 bits added: above every code that a format has."""

COLUMNS, COUNTS, VALUES = "outlier_columns", "outlier_counts", "outlier_values"
"""The sparse matrix among the parameters, row by row."""


@dataclass(frozen=True)
class Outliers:
    """Weights in the format ``inner``, but for the ``share`` of a layer's weights whose rounding would cost most.

    Which they are is decided on the weight as it is: those of the largest ``h_j (w_ij - q_ij)^2``, with ``q`` the
    nearest value of ``inner`` and ``h_j`` the importance of the input (1 without one): ``H_jj`` under
    ``quantizer=nearest``, what an error costs once later columns have made up for it under those that feed errors back
    (``1 / U_jj^2``, see ``aptq.quantizers.factors``). Then ``inner`` is fitted anew
    with the mean of their group's other weights in their place, so that they do not widen its range. What is stored is
    the weight that the quantizer has come to at their place, rounded to 16 bits.

    A layer ``[out, in]`` has ``round(share * out * in)`` outliers, stored row by row: ``outlier_columns`` and
    ``outlier_values``, two bytes each, and ``outlier_counts``, two bytes a row (columns and counts have four where
    there are more than 32767 inputs). All of them count as storage; a code is stored at their place as well.

    Source: the split is that of SpQR (Dettmers et al. 2023) and SqueezeLLM (Kim et al. 2023), and of GWQ and TaCQ with
    other criteria; the criterion is SpQR's sensitivity, whose ``h_j`` is ``1 / [H^-1]_jj``: made up for by all columns.
    """

    inner: Format
    share: float = 0.005
    value_dtype: str = "float16"

    def __post_init__(self) -> None:
        if isinstance(self.inner, FormatSet):
            raise AptqError("format.inner is several formats; give each of them its outliers instead.")
        if not 0.0 <= self.share <= 0.5:
            raise AptqError(f"format.share={self.share} is not allowed; it is a share of the weights from 0 to 0.5.")
        if self.value_dtype not in _VALUE_DTYPES:
            raise AptqError(
                f"format.value_dtype={self.value_dtype!r} is not known; use one of {', '.join(_VALUE_DTYPES)}."
            )

    @property
    def group_size(self) -> int:
        """That of ``inner``."""
        return self.inner.group_size

    def check(self, option: Option, shape: tuple[int, int]) -> None:
        """Raise ``AptqError`` when ``inner`` cannot store a layer so, codes several weights at once or has outliers."""
        self.inner.check(option, shape)
        if COLUMNS in self.inner.packed_layout(option, shape):
            raise AptqError("format.inner keeps outliers itself; use one format=outliers with a larger share.")
        if option not in self._tried:
            with torch.device("cpu"):  # whatever the caller makes: layers are made on meta first
                coded_apart(self.inner.fit(torch.zeros(1, 32, 32), option), _AROUND)
            self._tried.add(option)

    @cached_property
    def _tried(self) -> set[Option]:
        """Options that ``inner`` codes each weight by itself at: it takes a fit to know, and layers are many."""
        return set()

    def fit(self, weight: Tensor, option: Option, importance: Tensor | None = None) -> OutlierGrid:
        """Choose the outliers of a weight ``[heads, rows, in]`` and fit ``inner`` to the rest."""
        grid = self.inner.fit(weight, option, importance)
        columns = weight.transpose(1, 2)  # [heads, in, rows]
        error = (grid.round(columns, slice(None))[1] - columns).square_()
        if importance is not None:
            error *= importance.to(error.dtype).unsqueeze(-1)
        mask = torch.zeros(columns.numel(), dtype=torch.bool, device=weight.device)
        mask[error.flatten().topk(self._count(columns.numel())).indices] = True
        mask = mask.view(columns.shape)
        if mask.any():
            grid = self.inner.fit(_filled(weight, mask.transpose(1, 2), option), option, importance)
        return self._around(grid, mask)

    def grid(self, quantized: QuantizedWeight, option: Option) -> OutlierGrid:
        """Return the grid that a stored weight lies on; see ``aptq.api.RoundableFormat``.

        Raises:
            AptqError: ``inner`` cannot give one.
        """
        if not isinstance(self.inner, RoundableFormat):
            raise AptqError(f"format.inner={self.inner} does not give back the grid of a stored weight.")
        inner, rows, columns = _taken_apart(quantized)
        mask = torch.zeros(quantized.codes.shape, dtype=torch.bool, device=rows.device)
        mask[rows, columns] = True
        return self._around(self.inner.grid(inner, option), mask.T[None])

    def _around(self, inner: object, mask: Tensor) -> OutlierGrid:
        order = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape[0], -1)
        return OutlierGrid(coded_apart(inner, _AROUND), mask, order, FLOATS[self.value_dtype])

    def _count(self, weights: int) -> int:
        return round(self.share * weights)

    def dequantize(self, quantized: QuantizedWeight, option: Option) -> Tensor:
        """Return the weight in float32 ``[out, in]``."""
        inner, rows, columns = _taken_apart(quantized)
        weight = self.inner.dequantize(inner, option)
        weight[rows, columns] = quantized.parameters[VALUES].float()
        return weight

    def pack(self, quantized: QuantizedWeight, option: Option) -> dict[str, Tensor]:
        """Return the tensors of ``inner``, and those of the sparse matrix (see the class)."""
        inner, _, _ = _taken_apart(quantized)
        sparse = {name: quantized.parameters[name].contiguous() for name in (COLUMNS, COUNTS, VALUES)}
        return {**self.inner.pack(inner, option), **sparse}

    def unpack(self, tensors: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> QuantizedWeight:
        """Invert ``pack``."""
        sparse = {name: tensors[name] for name in (COLUMNS, COUNTS, VALUES)}
        inner = self.inner.unpack({name: each for name, each in tensors.items() if name not in sparse}, option, shape)
        return replace(inner, parameters={**inner.parameters, **sparse})

    def packed_layout(self, option: Option, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of the tensors that ``pack`` gives."""
        count = (self._count(shape[0] * shape[1]),)
        return {
            **self.inner.packed_layout(option, shape),
            COLUMNS: (count, index_dtype(shape[1])),
            COUNTS: ((shape[0],), index_dtype(shape[1])),
            VALUES: (count, FLOATS[self.value_dtype]),
        }


@dataclass(frozen=True, eq=False)
class OutlierGrid:
    """A grid of ``inner`` that leaves outliers as they are, but for rounding them to 16 bits."""

    inner: EntryGrid
    mask: Tensor  # bool [heads, in, rows], in the order of this grid's columns
    order: Tensor  # [heads, in]: column at each position
    dtype: torch.dtype  # of the outliers

    def permuted(self, order: Tensor) -> OutlierGrid:
        """Return the grid with position ``j`` of head ``h`` being this grid's column ``order[h, j]``."""
        return replace(
            self,
            inner=coded_apart(self.inner.permuted(order), _AROUND),
            mask=self.mask.gather(1, order.unsqueeze(-1).expand_as(self.mask)),
            order=self.order.gather(1, order),
        )

    def round(self, values: Tensor, position: int | slice) -> tuple[Tensor, Tensor]:
        """Round columns; see ``aptq.api.Grid.round``."""
        return self._but(self.mask[:, position], values, *self.inner.round(values, position))

    def round_entries(self, values: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Round single weights; see ``aptq.api.EntryGrid``."""
        head = torch.arange(rows.shape[0], device=rows.device)[:, None]
        return self._but(self.mask[head, positions, rows], values, *self.inner.round_entries(values, rows, positions))

    def _but(self, mask: Tensor, values: Tensor, codes: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and values with outliers as 16 bits."""
        most = torch.finfo(self.dtype).max
        kept = values.clamp(-most, most).to(self.dtype)
        bits = kept.view(torch.int16).to(torch.int32) & (_FIRST - 1)
        return torch.where(mask, bits + _FIRST, codes.to(torch.int32)), torch.where(mask, kept.to(values), rounded)

    def finish(self, codes: Tensor) -> QuantizedWeight:
        """Bind codes to the parameters of ``inner``, and make the sparse matrix of those that are outliers."""
        codes = codes.to(torch.int32)
        found = codes >= _FIRST
        inner = self.inner.finish(codes.masked_fill(found, 0))
        by_row = by_output(codes, self.order)  # [out, in]
        rows, columns = (by_row >= _FIRST).nonzero(as_tuple=True)
        bits = by_row[rows, columns] - _FIRST
        sparse = {
            COLUMNS: columns.to(index_dtype(codes.shape[1])),
            COUNTS: rows.bincount(minlength=by_row.shape[0]).to(index_dtype(codes.shape[1])),
            VALUES: torch.where(bits >= 1 << 15, bits - _FIRST, bits).to(torch.int16).view(self.dtype),
        }
        return replace(inner, parameters={**inner.parameters, **sparse})


def _filled(weight: Tensor, mask: Tensor, option: Option) -> Tensor:
    """Return ``weight [heads, rows, in]`` with the mean of a group's other weights where ``mask`` is."""
    parts = []
    for group, out in zip(split_groups(weight, option), split_groups(mask, option), strict=True):
        kept = group.masked_fill(out, 0.0)
        mean = kept.sum(-1, keepdim=True) / (~out).sum(-1, keepdim=True).clamp(min=1)
        parts.append(torch.where(out, mean, group))
    return torch.cat(parts, dim=-1)


def _taken_apart(quantized: QuantizedWeight) -> tuple[QuantizedWeight, Tensor, Tensor]:
    """Return what is of ``inner``, and the outliers' rows and columns."""
    parameters = quantized.parameters
    rest = {name: tensor for name, tensor in parameters.items() if name not in (COLUMNS, COUNTS, VALUES)}
    counts = parameters[COUNTS].long()
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return replace(quantized, parameters=rest), rows, parameters[COLUMNS].long()
