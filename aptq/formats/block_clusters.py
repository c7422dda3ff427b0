"""Codebooks of small integers, one of which serves each block of scalars: how LO-BCQ rounds.

A tensor is cut into *arrays* that share a scale, and each array into *blocks* of a few scalars. With the scale divided
out, the scalars of a block lie in [-31, 31] and are coded by one of several codebooks, the one that serves the block
best. ``aptq.formats.block_design`` designs them.

Source: Elangovan et al., "LO-BCQ: Locally Optimal Block Clustered Quantization" (arXiv 2502.05376).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Self

import torch
from torch import Tensor

from aptq.api import AptqError

TOP = 31
"""Largest entry: entries are integers of 6 bits, symmetric about 0."""

_HALVES = 2 * TOP  # cells of half a unit on each side of 0: midpoints of integers lie between two of them


COUNTS = (1, 2, 4, 8, 16)
"""How many codebooks there can be."""


def check_counts(section: str, block_size: int, num_codebooks: int) -> None:
    """Raise ``AptqError`` for blocks or numbers of codebooks that cannot be; ``section`` is that of the config."""
    if block_size < 1:
        raise AptqError(f"{section}.block_size={block_size} is not allowed; use a positive number of scalars.")
    if num_codebooks not in COUNTS:
        allowed = ", ".join(map(str, COUNTS))
        raise AptqError(f"{section}.num_codebooks={num_codebooks} is not allowed; use one of {allowed}.")


def selector_bits(num_codebooks: int) -> int:
    """Return how many bits tell one codebook from the others."""
    return num_codebooks.bit_length() - 1


@cache
def _frozen() -> dict[str, list[list[int]]]:
    found: dict[str, list[list[int]]] = json.loads(
        files("aptq.formats").joinpath("block_codebooks.json").read_text(encoding="utf-8")
    )["codebooks"]
    return found


def frozen_entries(source: str, count: int, levels: int) -> Tensor:
    """Return codebooks that come with this package, int8 ``[count, levels]``.

    ``benchmarks/block_codebooks.py`` designed them: those of ``normal`` for arrays of 64 standard normal numbers, those
    of ``activations`` for what the layers of a language model are called with.
    """
    return torch.tensor(_frozen()[f"{source}/{count}/{levels}"], dtype=torch.int8)


@dataclass(frozen=True, eq=False)
class Codebooks:
    """Codebooks with integer entries, and tables that find a value's nearest entry by one look-up.

    Midpoints between integers are multiples of 1/2. So all values in ``[j/2, (j+1)/2)`` have the same nearest entry
    (the upper one, at a midpoint itself), and ``floor(2 y)`` is all that has to be known of a value.
    """

    entries: Tensor  # [count, levels], float, integers in [-TOP, TOP], rising
    codes: Tensor  # [count, cells], uint8: the nearest entry in each cell of half a unit
    nearest: Tensor  # [count, cells], float: its value

    @classmethod
    def of(cls, entries: Tensor) -> Self:
        """Make the tables of ``entries [count, levels]``, integers in rising order, in their dtype."""
        centres = (torch.arange(2 * _HALVES, device=entries.device) - _HALVES + 0.5).to(entries.dtype) / 2
        codes = nearest_entries(centres.expand(len(entries), -1), entries)
        return cls(entries, codes.to(torch.uint8), entries.gather(1, codes))

    def cells(self, values: Tensor) -> Tensor:
        """Return the cell of each value, int32 in the shape of ``values``; some cell where it is NaN."""
        low, high = values.new_tensor(-_HALVES), values.new_tensor(_HALVES - 1)
        return torch.fmin(torch.fmax((values * 2).floor_(), low), high).int().add_(_HALVES)

    def places(self, values: Tensor, selectors: Tensor) -> Tensor:
        """Return where the tables, flattened, tell of values, by the codebooks that ``selectors`` name.

        Args:
            values: of any shape, with the scale divided out.
            selectors: which codebook; integers that broadcast to ``values``.
        """
        return self.cells(values) + selectors.int() * self.codes.shape[1]

    def round(self, values: Tensor, selectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes of values, uint8, and the entries that they name; arguments as of ``places``."""
        places = self.places(values, selectors)
        return look_up(self.codes.flatten(), places), look_up(self.nearest.flatten(), places)

    def choose(self, blocks: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the best codebook of each block, uint8 ``[...]``, and its weighted squared error ``[...]``.

        Args:
            blocks: ``[..., size]``, with the scale divided out, in the dtype of the entries.
            weights: broadcast to ``blocks``; all are 1 by default.
        """
        cells = self.cells(blocks)
        errors = blocks.new_empty(len(self.nearest), *blocks.shape[:-1])
        for error, table in zip(errors, self.nearest, strict=True):
            square = look_up(table, cells).sub_(blocks).square_()
            torch.sum(square if weights is None else square.mul_(weights), -1, out=error)
        least, chosen = errors.min(0)
        return chosen.to(torch.uint8), least


def look_up(table: Tensor, places: Tensor) -> Tensor:
    """Return ``table[places]`` for a table of one dimension, ten times faster than indexing does."""
    return table.index_select(0, places.flatten()).view(places.shape)


def nearest_entries(values: Tensor, entries: Tensor) -> Tensor:
    """Return the index of the entry nearest to each value of its row; at a midpoint the upper one.

    Args:
        values: ``[count, n]``.
        entries: ``[count, levels]``, rising.
    """
    midpoints = (entries[:, 1:] + entries[:, :-1]) / 2
    return torch.searchsorted(midpoints.contiguous(), values.contiguous(), right=True)
