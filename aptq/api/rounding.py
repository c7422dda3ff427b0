"""What a code means and how the codes are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from aptq.api.curvature import Curvature
from aptq.api.model import Option
from aptq.errors import AptqError


@dataclass(frozen=True, eq=False, kw_only=True)
class QuantizedWeight:
    """Codes and the parameters that give them meaning; only the format that made it can read it."""

    codes: Tensor  # integer; [out, in] unless the format says otherwise
    parameters: Mapping[str, Tensor]


class Grid(Protocol):
    """A format fitted to one weight ``[heads, rows, in]``: rounds one column at a time, in any order of columns."""

    def permuted(self, order: Tensor) -> Grid:
        """Return the same grid with position ``j`` of head ``h`` being column ``order[h, j]`` (``[heads, in]``)."""

    def round(self, values: Tensor, position: int | slice) -> tuple[Tensor, Tensor]:
        """Round one column, or a run of columns that need no feedback between them.

        Args:
            values: ``[heads, rows]`` for a position, ``[heads, columns, rows]`` for a slice of positions; float, the
                weights after error feedback. Note the order: columns before rows.
            position: where in this grid's order of columns.

        Returns:
            codes, integer-valued in any dtype, in the shape of ``values`` (the last dimension is shorter for formats
            that code several rows at once); and what the codes stand for, in shape and dtype of ``values``.
        """

    def finish(self, codes: Tensor) -> QuantizedWeight:
        """Bind codes ``[heads, in, rows]``, in the order of *this* grid's columns, to the parameters."""


@runtime_checkable
class EntryGrid(Grid, Protocol):
    """A grid that codes each weight by itself: what quantizers need that cross a weight diagonally."""

    def round_entries(self, values: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Round single weights.

        Args:
            values: ``[heads, entries]``, float.
            rows: ``[heads, entries]``, int64: the row of each in its head.
            positions: ``[heads, entries]``, int64: where in this grid's order of columns each is.

        Returns:
            codes and what they stand for, as ``round`` gives them for a column.
        """


@runtime_checkable
class RefitGrid(Grid, Protocol):
    """A grid that learns from what error feedback made of the columns.

    Quantizers that feed errors back run again on the new grid, and keep the best run by their own objective.
    """

    def refit(self, columns: Tensor) -> Grid | None:
        """Return a grid fitted to ``columns``; None when this one is to stay, which ends the runs.

        ``columns [heads, in, rows]``, in the order of this grid's columns, are what ``round`` was given in the run.
        """


@runtime_checkable
class TunedGrid(Grid, Protocol):
    """A grid whose parameters are fitted once more when all codes are chosen, and stay."""

    @property
    def tunes(self) -> bool:
        """Whether it is to be asked at all."""

    def tuned(self, codes: Tensor, target: Tensor, hessian: Tensor) -> Grid:
        """Return a grid on which the same codes lose no more: of ``sum_h tr((T - V)^T H (T - V))``.

        Args:
            codes: ``[heads, in, rows]`` as ``round`` gave them, in the order of this grid's columns, and so the others.
            target: ``T [heads, in, rows]``, the weight.
            hessian: ``H [heads, in, in]``, positive definite.
        """


@runtime_checkable
class Format(Protocol):
    """What a code means. Options such as symmetry are fields; bits and group size come with the ``Option``."""

    @property
    def group_size(self) -> int:
        """The group size of options that name none."""

    def check(self, option: Option, shape: tuple[int, int]) -> None:
        """Raise ``AptqError`` when a layer of this shape cannot be stored so; say what is allowed."""

    def fit(self, weight: Tensor, option: Option, importance: Tensor | None = None) -> Grid:
        """Fit scales, zeros or codebooks to a weight ``[heads, rows, in]``, float.

        ``importance [heads, in]``, where the quantizer has one, is the diagonal of the curvature.

        Raises:
            AptqError: several heads, which the format cannot code one by one.
        """

    def dequantize(self, quantized: QuantizedWeight, option: Option) -> Tensor:
        """Return the weight ``[out, in]`` in float32 that the codes stand for, bit for bit as the grid rounded it."""

    def pack(self, quantized: QuantizedWeight, option: Option) -> dict[str, Tensor]:
        """Return the tensors to store, dense to the bit."""

    def unpack(self, tensors: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> QuantizedWeight:
        """Invert ``pack`` for a layer of shape ``(out, in)``."""

    def packed_layout(self, option: Option, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of each tensor that ``pack`` gives, without making it."""


@runtime_checkable
class RoundableFormat(Format, Protocol):
    """A format whose stored layers can be rounded to anew: whoever trains a quantized model needs it."""

    def grid(self, quantized: QuantizedWeight, option: Option) -> Grid:
        """Return the grid that a stored weight lies on: one head, columns in their natural order.

        What ``dequantize`` gives is rounded to itself; ``finish`` binds other codes to the same parameters.
        """


@runtime_checkable
class TransformFormat(Format, Protocol):
    """A format that can say whether rounding in a transform's basis makes it better, all else equal.

    ``transform=auto`` goes by it; formats that do not say so keep the model's own basis.
    """

    @property
    def gains_by_transforms(self) -> bool:
        """Whether it does with its present options."""


@runtime_checkable
class RowFormat(Format, Protocol):
    """A format that unpacks single rows: what a table needs whose rows are looked up."""

    def unpack_rows(
        self, tensors: Mapping[str, Tensor], option: Option, rows: Tensor, in_features: int
    ) -> QuantizedWeight:
        """Invert ``pack`` for some rows of a weight ``[out, in_features]``, and read no others.

        ``rows [n]``, int64, are given in any order, some perhaps twice; ``dequantize`` gives them as ``[n, in]``, bit
        for bit as in the whole weight.
        """


@runtime_checkable
class FormatSet(Format, Protocol):
    """A format that is several: each layer is stored in the one that its ``Option.format`` names."""

    @property
    def formats(self) -> Mapping[str, Format]:
        """The formats by name."""


def format_of(format: Format, option: Option) -> Format:
    """Return the format that a layer is stored in: one of a set, or the format itself.

    Raises:
        AptqError: the set has no format of that name.
    """
    if not isinstance(format, FormatSet):
        return format
    if option.format not in format.formats:
        raise AptqError(f"No format {option.format!r} is in the set; there are {', '.join(format.formats)}.")
    return format.formats[option.format]


class Factors(Protocol):
    """What a quantizer prepared from a curvature: shared by all layers that share the curvature."""

    @property
    def damping(self) -> float:
        """The damping used, as a share of the mean diagonal; 0 where none was."""

    @property
    def events(self) -> tuple[str, ...]:
        """What went wrong and was mended, in words ("damping raised to 0.1", "fell back to the diagonal")."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Rounded:
    """What a quantizer made of one layer, and the grid that it rounded on, columns in their natural order."""

    weight: QuantizedWeight
    grid: Grid


@runtime_checkable
class Quantizer(Protocol):
    """How the codes are chosen."""

    def prepare(self, curvature: Curvature) -> Factors:
        """Do the work that all layers with this curvature share (damping, order, factorization)."""

    def quantize(self, weight: Tensor, factors: Factors, format: Format, option: Option) -> Rounded:
        """Choose codes for a weight ``[out, in]`` under a format."""


@runtime_checkable
class DraftQuantizer(Quantizer, Protocol):
    """A quantizer that has a quicker version of itself.

    Pass 1 rounds every layer at every option to see what it costs. What a slower search wins there is nearly the same
    share everywhere, so the quicker one tells layers and options apart as well.
    """

    @property
    def draft(self) -> Quantizer:
        """The quicker version: with the same factors, and codes of the same objective."""


@runtime_checkable
class DriftQuantizer(Quantizer, Protocol):
    """A quantizer that may aim at the full-precision model's outputs, not at those of ``W`` on the inputs it meets.

    In pass 2 it gets curvatures with their ``drift``, for which a second set of activations travels beside the first.
    """

    @property
    def needs_drift(self) -> bool:
        """Whether it does with its present options."""
