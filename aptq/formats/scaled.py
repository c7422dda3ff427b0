"""Another format with a scale for each input channel: large where an error would be multiplied by large inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aptq.api import (
    AptqError,
    EntryGrid,
    Format,
    FormatSet,
    Grid,
    Option,
    QuantizedWeight,
    RefitGrid,
    RoundableFormat,
    TunedGrid,
)
from aptq.formats.scales import FLOATS

_LEAST = 1e-6
"""Importance, as a share of the largest, that all below it are taken to have: factors stay within 1e3 of each other."""

SCALES = "input_scales"
"""What channels are divided by, among the parameters."""


@dataclass(frozen=True)
class Scaled:
    """``w_ij = v_ij r_j``, with ``v`` in the format ``inner`` and a stored factor ``r`` for each input channel.

    A channel's weights are multiplied by ``s_j = 1 / r_j`` before they are rounded, so that what is rounded off is
    smaller by ``s_j`` there and larger elsewhere in its group. ``s_j`` is ``h_j^(a/2)`` over its geometric mean, with
    ``h_j`` the importance of the channel (its mean squared input, or what the quantizer makes of it) and the exponent
    ``a`` the one with the least ``sum_ij h_j (w_ij - q_ij)^2`` of ``steps`` + 1 from 0, where it is ``inner`` alone, to
    1. Without importance all factors are 1.

    Nothing in the model is changed but the layer itself, which costs 16 bits more a channel; AWQ folds the factors into
    the layer before, where there is one.

    Source: Lin et al., "AWQ: Activation-aware Weight Quantization" (MLSys 2024), section 3.2; there ``h_j^(1/2)`` is
    the mean magnitude of the input, and the error searched is that of outputs.
    """

    inner: Format
    steps: int = 10
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if isinstance(self.inner, FormatSet):
            raise AptqError("format.inner is several formats; give each of them its scales instead.")
        if self.steps < 1:
            raise AptqError(f"format.steps={self.steps} is not allowed; use 1 or more.")
        if self.scale_dtype not in FLOATS:
            raise AptqError(f"format.scale_dtype={self.scale_dtype!r} is not known; use one of {', '.join(FLOATS)}.")

    @property
    def group_size(self) -> int:
        """That of ``inner``."""
        return self.inner.group_size

    def check(self, option: Option, shape: tuple[int, int]) -> None:
        """Raise ``AptqError`` when ``inner`` cannot store a layer so."""
        self.inner.check(option, shape)

    def fit(self, weight: Tensor, option: Option, importance: Tensor | None = None) -> ScaledGrid:
        """Fit ``inner`` to a weight ``[heads, rows, in]`` under the exponent of the least weighted error."""
        if importance is None:
            return self._grid(weight, option, None, torch.ones_like(weight[0, 0]))
        channels = importance.mean(0).to(weight.dtype)  # the heads of a layer have one input
        exponents = (step / self.steps for step in range(self.steps + 1))
        tried = (self._grid(weight, option, importance, self._factors(channels, each)) for each in exponents)
        return min(tried, key=lambda grid: weighted_error(grid, weight, importance))

    def _factors(self, channels: Tensor, exponent: float) -> Tensor:
        """Return ``r [in]`` as it will be stored, for importances ``[in]``."""
        floor = channels.max() * _LEAST
        if not floor > 0:  # nothing counts
            return torch.ones_like(channels)
        logs = channels.clamp(min=floor).log()
        factors = torch.exp((logs.mean() - logs) * (exponent / 2))
        return factors.to(FLOATS[self.scale_dtype]).to(channels.dtype)

    def _grid(self, weight: Tensor, option: Option, importance: Tensor | None, factors: Tensor) -> ScaledGrid:
        """Fit ``inner`` to ``w / r``; an error in it counts ``r^2`` times as much."""
        weighed = None if importance is None else importance * factors.square()
        inner = self.inner.fit(weight / factors, option, weighed)
        return _around(inner, factors.expand(weight.shape[0], -1), factors, FLOATS[self.scale_dtype])

    def grid(self, quantized: QuantizedWeight, option: Option) -> ScaledGrid:
        """Return the grid that a stored weight lies on; see ``aptq.api.RoundableFormat``.

        Raises:
            AptqError: ``inner`` cannot give one.
        """
        if not isinstance(self.inner, RoundableFormat):
            raise AptqError(f"format.inner={self.inner} does not give back the grid of a stored weight.")
        inner, factors = _taken_apart(quantized)
        grid, natural = self.inner.grid(inner, option), factors.float()
        return _around(grid, natural[None], natural, FLOATS[self.scale_dtype])

    def dequantize(self, quantized: QuantizedWeight, option: Option) -> Tensor:
        """Return ``v_ij r_j`` in float32 ``[out, in]``."""
        inner, factors = _taken_apart(quantized)
        return self.inner.dequantize(inner, option) * factors.float()

    def pack(self, quantized: QuantizedWeight, option: Option) -> dict[str, Tensor]:
        """Return the tensors of ``inner``, and ``input_scales [in]``."""
        inner, factors = _taken_apart(quantized)
        return {**self.inner.pack(inner, option), SCALES: factors}

    def unpack(self, tensors: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> QuantizedWeight:
        """Invert ``pack``."""
        rest = {name: tensor for name, tensor in tensors.items() if name != SCALES}
        return _with(self.inner.unpack(rest, option, shape), tensors[SCALES])

    def packed_layout(self, option: Option, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of the tensors that ``pack`` gives."""
        return {**self.inner.packed_layout(option, shape), SCALES: ((shape[1],), FLOATS[self.scale_dtype])}


def weighted_error(grid: Grid, weight: Tensor, importance: Tensor) -> float:
    """Return ``sum_hij importance_hj (w_hij - q_hij)^2`` of rounding ``weight [heads, rows, in]`` to nearest."""
    columns = weight.transpose(1, 2)
    error = (grid.round(columns, slice(None))[1] - columns).square().sum(-1)  # [heads, in]
    return float((error * importance).sum())


@dataclass(frozen=True, eq=False)
class ScaledGrid:
    """A grid of ``inner`` on weights that are divided by the factors of their channels."""

    inner: Grid
    factors: Tensor  # [heads, in], in the order of this grid's columns
    natural: Tensor  # [in], in their own order
    dtype: torch.dtype  # in which they are stored

    def permuted(self, order: Tensor) -> ScaledGrid:
        """Return the grid with position ``j`` of head ``h`` being this grid's column ``order[h, j]``."""
        return replace(self, inner=self.inner.permuted(order), factors=self.factors.gather(1, order))

    def round(self, values: Tensor, position: int | slice) -> tuple[Tensor, Tensor]:
        """Round columns; see ``aptq.api.Grid.round``."""
        factors = self.factors[:, position].unsqueeze(-1)
        codes, rounded = self.inner.round(values / factors, position)
        return codes, rounded * factors

    def finish(self, codes: Tensor) -> QuantizedWeight:
        """Bind codes to the parameters of ``inner`` and the factors."""
        return _with(self.inner.finish(codes), self.natural.to(self.dtype))

    @property
    def tunes(self) -> bool:
        """Whether ``inner`` does; see ``aptq.api.TunedGrid``."""
        return isinstance(self.inner, TunedGrid) and self.inner.tunes

    def tuned(self, codes: Tensor, target: Tensor, hessian: Tensor) -> ScaledGrid:
        """Fit ``inner`` under the same factors ``r``, for which ``T / r`` is the weight; see ``aptq.api.TunedGrid``."""
        assert isinstance(self.inner, TunedGrid)  # others do not tune
        factors = self.factors.unsqueeze(-1)
        inner = self.inner.tuned(codes, target / factors, factors * hessian * factors.transpose(1, 2))
        return replace(self, inner=inner)


@dataclass(frozen=True, eq=False)
class ScaledEntryGrid(ScaledGrid):
    """The same, for an ``inner`` that codes each weight by itself."""

    inner: EntryGrid

    def round_entries(self, values: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Round single weights; see ``aptq.api.EntryGrid``."""
        factors = self.factors.gather(1, positions)
        codes, rounded = self.inner.round_entries(values / factors, rows, positions)
        return codes, rounded * factors


@dataclass(frozen=True, eq=False)
class ScaledRefitGrid(ScaledGrid):
    """The same, for an ``inner`` that learns from what error feedback made of the columns."""

    inner: RefitGrid

    def refit(self, columns: Tensor) -> ScaledGrid | None:
        """Fit ``inner`` anew under the same factors; see ``aptq.api.RefitGrid``."""
        refitted = self.inner.refit(columns / self.factors.unsqueeze(-1))
        return None if refitted is None else _around(refitted, self.factors, self.natural, self.dtype)


def _around(inner: Grid, factors: Tensor, natural: Tensor, dtype: torch.dtype) -> ScaledGrid:
    """Return a grid around ``inner`` that can do what that can."""
    if isinstance(inner, EntryGrid):
        return ScaledEntryGrid(inner, factors, natural, dtype)
    if isinstance(inner, RefitGrid):
        return ScaledRefitGrid(inner, factors, natural, dtype)
    return ScaledGrid(inner, factors, natural, dtype)


def _with(inner: QuantizedWeight, factors: Tensor) -> QuantizedWeight:
    return replace(inner, parameters={**inner.parameters, SCALES: factors})


def _taken_apart(quantized: QuantizedWeight) -> tuple[QuantizedWeight, Tensor]:
    rest = {name: tensor for name, tensor in quantized.parameters.items() if name != SCALES}
    return replace(quantized, parameters=rest), quantized.parameters[SCALES]
