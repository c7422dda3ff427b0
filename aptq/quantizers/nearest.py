"""Round to nearest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from aptq.api import Curvature, Format, Option, Rounded


@dataclass(frozen=True, eq=False)
class NearestFactors:
    """The diagonal that a format may fit its grid with; nothing is factorized."""

    heads: int
    importance: Tensor  # [heads, in]
    damping: float = 0.0
    events: tuple[str, ...] = ()


@dataclass(frozen=True)
class Nearest:
    """Give each weight the nearest level of the format's grid, whatever the other weights get."""

    def prepare(self, curvature: Curvature) -> NearestFactors:
        """Keep the curvature's diagonal."""
        return NearestFactors(curvature.heads, curvature.column.diagonal(dim1=1, dim2=2))

    def quantize(self, weight: Tensor, factors: NearestFactors, format: Format, option: Option) -> Rounded:
        """Round a weight ``[out, in]``, all columns at once."""
        heads = weight.float().reshape(factors.heads, -1, weight.shape[-1])
        grid = format.fit(heads, option, factors.importance)
        codes, _ = grid.round(heads.transpose(1, 2), slice(None))
        return Rounded(weight=grid.finish(codes), grid=grid)
