"""The grid of format ``group_bits``: one grid of the inner format for the columns of each width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from aptq.api import EntryGrid, QuantizedWeight
from aptq.formats.grouped import coded_apart

AROUND = "group_bits"
"""What the format is called."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """The columns of one width, and the grid that they are rounded on."""

    bits: int
    columns: Tensor  # [n], int64: in the order that they are stored in
    grid: EntryGrid  # of these columns alone


def columns_of(widths: Tensor, members: Tensor) -> list[tuple[int, Tensor]]:
    """Return each width that occurs, in rising order, and its columns ``[n]``: group by group, in a group as they are.

    Args:
        widths: ``[groups]``.
        members: ``[in]``: the group of each column.
    """
    order = members.long().argsort(stable=True)
    width = widths[members.long()][order]
    return [(bits, order[width == bits]) for bits in widths.unique().tolist()]


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupBitsGrid:
    """Columns of several widths, each rounded on the grid of its part."""

    parts: tuple[Part, ...]  # the order of their grids' columns is that of this grid's
    part: Tensor  # [heads, in]: which part the column at each position is of
    place: Tensor  # [heads, in]: at which position of its part's grid
    stored: Mapping[str, Tensor]  # parameters that say which columns have which width

    @classmethod
    def around(cls, parts: Sequence[Part], heads: int, stored: Mapping[str, Tensor]) -> GroupBitsGrid:
        """Return the grid of parts whose columns are in the order that they are stored in."""
        width = sum(len(each.columns) for each in parts)
        device = parts[0].columns.device
        part, place = (torch.empty(width, dtype=torch.int64, device=device) for _ in range(2))
        for number, each in enumerate(parts):
            part[each.columns] = number
            place[each.columns] = torch.arange(len(each.columns), device=device)
        grid = cls(parts=tuple(parts), part=part.expand(heads, -1), place=place.expand(heads, -1), stored=stored)
        return grid.permuted(torch.arange(width, device=device).expand(heads, -1))

    def permuted(self, order: Tensor) -> GroupBitsGrid:
        """Return the grid with position ``j`` of head ``h`` being this grid's column ``order[h, j]``."""
        part, before = self.part.gather(1, order), self.place.gather(1, order)
        place = torch.empty_like(before)
        parts = []
        for number, each in enumerate(self.parts):
            mine = part == number
            local = before[mine].view(len(order), -1)  # all heads have as many of them
            place[mine] = torch.arange(local.shape[1], device=order.device).repeat(len(order))
            parts.append(replace(each, grid=coded_apart(each.grid.permuted(local), AROUND)))
        return replace(self, parts=tuple(parts), part=part, place=place)

    @cached_property
    def _alike(self) -> list[tuple[int, int] | None]:
        """Part and place of each position where all heads have the same there, else None."""
        alike = ((self.part == self.part[:1]) & (self.place == self.place[:1])).all(0).tolist()
        where = zip(alike, self.part[0].tolist(), self.place[0].tolist(), strict=True)
        return [(part, place) if same else None for same, part, place in where]

    def round(self, values: Tensor, position: int | slice) -> tuple[Tensor, Tensor]:
        """Round columns; see ``aptq.api.Grid.round``."""
        if isinstance(position, slice):
            return self._round_run(values, range(self.part.shape[1])[position])
        if (where := self._alike[position]) is None:
            codes, rounded = self._round_run(values[:, None], range(position, position + 1))
            return codes[:, 0], rounded[:, 0]
        codes, rounded = self.parts[where[0]].grid.round(values, where[1])
        return codes.to(torch.int32), rounded

    def _round_run(self, values: Tensor, positions: range) -> tuple[Tensor, Tensor]:
        """Round ``values [heads, n, rows]`` of a run of positions."""
        heads, _, rows = values.shape
        run = slice(positions.start, positions.stop)
        if any(each is None for each in self._alike[run]):
            row = torch.arange(rows, device=values.device).expand(heads, len(positions), -1).flatten(1)
            position = torch.arange(run.start, run.stop, device=values.device).repeat_interleave(rows)
            codes, rounded = self.round_entries(values.flatten(1), row, position.expand(heads, -1))
            return codes.view(values.shape), rounded.view(values.shape)
        codes, rounded = torch.empty(values.shape, dtype=torch.int32, device=values.device), torch.empty_like(values)
        for number, part in enumerate(self.parts):
            mine = (self.part[0, run] == number).nonzero()[:, 0]
            if len(mine):
                first = int(self.place[0, run][mine[0]])  # the others follow: a part has this grid's order
                code, value = part.grid.round(values[:, mine], slice(first, first + len(mine)))
                codes[:, mine], rounded[:, mine] = code.to(torch.int32), value
        return codes, rounded

    def round_entries(self, values: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Round single weights; see ``aptq.api.EntryGrid``."""
        part, place = self.part.gather(1, positions), self.place.gather(1, positions)
        codes, rounded = torch.zeros_like(part, dtype=torch.int32), torch.zeros_like(values)
        for number, each in enumerate(self.parts):
            mine = part == number
            code, value = each.grid.round_entries(values, rows, torch.where(mine, place, 0))
            codes, rounded = torch.where(mine, code.to(torch.int32), codes), torch.where(mine, value, rounded)
        return codes, rounded

    def finish(self, codes: Tensor) -> QuantizedWeight:
        """Bind codes ``[heads, in, rows]`` to the parameters of all parts, columns back in their natural order."""
        heads, width, rows = codes.shape
        natural = torch.empty(heads * rows, width, dtype=torch.int32, device=codes.device)
        parameters = dict(self.stored)
        for number, part in enumerate(self.parts):
            finished = part.grid.finish(codes[self.part == number].view(heads, -1, rows))
            natural[:, part.columns] = finished.codes.to(torch.int32)
            parameters |= {f"{part.bits}.{name}": tensor for name, tensor in finished.parameters.items()}
        return QuantizedWeight(codes=natural, parameters=parameters)


def part_of(quantized: QuantizedWeight, bits: int, columns: Tensor) -> QuantizedWeight:
    """Return the columns of one width as ``inner`` knows them; codes in memory ``[in, out]``, as unpacked ones are."""
    prefix = f"{bits}."
    mine = {name.removeprefix(prefix): each for name, each in quantized.parameters.items() if name.startswith(prefix)}
    codes = quantized.codes.T[columns].T
    return QuantizedWeight(codes=codes.to(torch.uint8) if bits <= 8 else codes, parameters=mine)
