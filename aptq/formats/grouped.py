"""What formats with parameters for each group of inputs have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from aptq.api import AptqError, EntryGrid, Option, TunedGrid
from aptq.formats.scales import SCALE_DTYPES


def check_fields(group_size: int, scale_dtype: str, clip_steps: int, clip_min: float) -> None:
    """Raise ``AptqError`` for options of a format that cannot be."""
    if scale_dtype not in SCALE_DTYPES:
        raise AptqError(f"format.scale_dtype={scale_dtype!r} is not known; use one of {', '.join(SCALE_DTYPES)}.")
    if group_size != -1 and group_size < 1:
        raise AptqError(f"format.group_size={group_size} is not allowed; use -1 (a whole row) or a positive size.")
    if clip_steps < 0 or not 0.0 < clip_min < 1.0:
        raise AptqError(
            f"format.clip_steps={clip_steps} and clip_min={clip_min} are not allowed; "
            "use clip_steps >= 0 and 0 < clip_min < 1."
        )


def check_group(option: Option) -> None:
    """Raise ``AptqError`` for a group size that is none."""
    if option.group_size != -1 and option.group_size < 1:
        raise AptqError(f"A group size is -1 (a whole row) or positive; got group_size={option.group_size}.")


def coded_apart(grid: object, around: str) -> EntryGrid:
    """Return a grid that a format ``around`` it can use: of weights that are coded each by itself, and never tuned.

    Raises:
        AptqError: the grid is another.
    """
    if not isinstance(grid, EntryGrid):
        raise AptqError(f"format={around} needs a format.inner that codes each weight by itself, such as integer.")
    if isinstance(grid, TunedGrid) and grid.tunes:
        raise AptqError(f"format={around} does not tune the parameters of format.inner; leave its finetune out.")
    return grid


def split_groups(values: Tensor, option: Option) -> list[Tensor]:
    """Split the last dimension, which is a layer's inputs, into groups; the last one may be shorter."""
    return list(values.split(option.group_width(values.shape[-1]), dim=-1))


def index_dtype(in_features: int) -> torch.dtype:
    """Return the dtype that indices of inputs are stored in."""
    return torch.int16 if in_features <= torch.iinfo(torch.int16).max else torch.int32


def by_output(codes: Tensor, order: Tensor) -> Tensor:
    """Return codes ``[heads, in, rows]`` of columns in ``order [heads, in]`` as ``[heads rows, in]``, in their own."""
    natural = torch.empty_like(codes)
    natural[torch.arange(len(codes), device=codes.device)[:, None], order] = codes
    return natural.permute(0, 2, 1).reshape(-1, codes.shape[1])


@dataclass(frozen=True, eq=False)
class GroupedGrid:
    """Parameters of the groups of one weight, and the order of its columns.

    They are expanded to one row of them per column before the first rounding, so that any order of columns is cheap.
    """

    parameters: tuple[Tensor, ...]  # [heads, groups, rows] each
    group: Tensor  # [heads, in]: group of the column at each position
    order: Tensor  # [heads, in]: column at each position

    @classmethod
    def places(cls, weight: Tensor, option: Option) -> tuple[Tensor, Tensor]:
        """Return ``group`` and ``order`` of a weight ``[heads, rows, in]`` in the natural order of columns."""
        heads, _, width = weight.shape
        order = torch.arange(width, device=weight.device).expand(heads, -1)
        return order // option.group_width(width), order

    def permuted(self, order: Tensor) -> Self:
        """Return the grid with position ``j`` of head ``h`` being this grid's column ``order[h, j]``."""
        return replace(self, group=self.group.gather(1, order), order=self.order.gather(1, order))

    @cached_property
    def _columns(self) -> tuple[Tensor, ...]:
        """Parameters ``[heads, in, rows]`` of each position's column."""
        head = torch.arange(self.group.shape[0], device=self.group.device)[:, None]
        return tuple(each[head, self.group] for each in self.parameters)

    @cached_property
    def _by_position(self) -> list[tuple[Tensor, ...]]:
        """The same, ``[heads, rows]`` for each position: picking from a list is cheaper than from a tensor."""
        return list(zip(*(each.unbind(1) for each in self._columns), strict=True))

    def _at(self, position: int | slice) -> tuple[Tensor, ...]:
        """Return the parameters of one position or a run of them."""
        if isinstance(position, int):
            return self._by_position[position]
        return tuple(each[:, position] for each in self._columns)

    def _of_entries(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Return the parameters of single weights, ``[heads, entries]``."""
        head = torch.arange(rows.shape[0], device=rows.device)[:, None]
        return tuple(each[head, positions, rows] for each in self._columns)

    def _natural(self, codes: Tensor) -> Tensor:
        """Return codes ``[heads, in, rows]`` as uint8 ``[out, in]``, columns back in their natural order."""
        return by_output(codes.to(torch.uint8), self.order)

    def _stored(self, parameter: Tensor) -> Tensor:
        """Return a parameter ``[heads, groups, rows]`` in the order that it is stored in, ``[groups, out]``."""
        heads, _, rows = parameter.shape
        return parameter.transpose(0, 1).reshape(-1, heads * rows)
