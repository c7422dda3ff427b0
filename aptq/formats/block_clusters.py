"""Clusters of blocks, each with a codebook of its own: the mathematics of LO-BCQ.

A tensor is cut into *arrays* that share a scale, and each array into *blocks* of a few scalars. With the scale divided
out, the scalars of a block lie in [-31, 31] and are coded by one of ``count`` codebooks, the one that serves the block
best. Codebooks are designed by turns, for a set of blocks ``y``, weights ``u`` and clusters ``c``:

    c(b) = argmin_c sum_i u_bi min_k (y_bi - C_ck)^2                 (each block goes to its best codebook)
    C_ck = sum u_bi y_bi / sum u_bi  over the y_bi of cluster c whose nearest entry is k    (Lloyd-Max)

Neither step can raise the error ``J = sum_b sum_i u_bi (y_bi - Q_c(b)(y_bi))^2``.

Source: Elangovan et al., "LO-BCQ: Locally Optimal Block Clustered Quantization" (arXiv 2502.05376), whose two steps
these are; the initialization, what becomes of idle entries and the rounding to integers are ours.
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

_LLOYD = 20  # iterations of Lloyd-Max where a codebook begins
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

    ``benchmarks/codebooks.py`` designed them: those of ``normal`` for arrays of 64 standard normal numbers, those of
    ``activations`` for what the layers of a language model are called with.
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


@dataclass(frozen=True, eq=False)
class Design:
    """Codebooks designed for some blocks, and the mean squared error ``J / sum u`` after every iteration."""

    real: Tensor  # [count, levels]: before they were rounded, rising
    entries: Tensor  # [count, levels]: integers in [-TOP, TOP], rising
    errors: tuple[float, ...]  # over the reals: never rises
    integer_errors: tuple[float, ...]  # over the integers: never rises either


def nearest_entries(values: Tensor, entries: Tensor) -> Tensor:
    """Return the index of the entry nearest to each value of its row; at a midpoint the upper one.

    Args:
        values: ``[count, n]``.
        entries: ``[count, levels]``, rising.
    """
    midpoints = (entries[:, 1:] + entries[:, :-1]) / 2
    return torch.searchsorted(midpoints.contiguous(), values.contiguous(), right=True)


def design(
    blocks: Tensor,
    count: int,
    levels: int,
    *,
    weights: Tensor | None = None,
    start: Tensor | None = None,
    iterations: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Design:
    """Design ``count`` codebooks of ``levels`` entries for blocks by turns until the error stays (see the module).

    Args:
        blocks: ``[n, size]``, float, with the scales divided out.
        count: of codebooks.
        levels: entries in each, at most ``2 * TOP + 1``.
        weights: what errors count, broadcast to ``blocks``; all are 1 by default.
        start: codebooks ``[count, levels]`` to go on from; by default ``beginning`` makes them.
        iterations: at most so many over the reals, and so many over the integers.
        tolerance: iterations end when one lowers the error by a smaller share.
        seed: of the blocks that codebooks begin with.
    """
    u = torch.ones_like(blocks) if weights is None else weights.to(blocks.dtype).expand_as(blocks).contiguous()
    total = u.sum().clamp(min=torch.finfo(u.dtype).tiny)
    real = beginning(blocks, u, count, levels, seed) if start is None else start.to(blocks.dtype)

    def improve(books: Tensor, whole: bool) -> tuple[Tensor, list[float]]:
        errors: list[float] = []
        for _ in range(iterations):
            chosen, least = assign(blocks, u, books)
            errors.append(float(least.sum() / total))
            if len(errors) > 1 and errors[-2] - errors[-1] <= tolerance * errors[-2]:
                break
            books = update(blocks, u, books, chosen, whole=whole)
        return books, errors

    real, errors = improve(real, whole=False)
    entries, integer_errors = improve(distinct(real), whole=True)
    return Design(real, entries, tuple(errors), tuple(integer_errors))


def beginning(blocks: Tensor, weights: Tensor, count: int, levels: int, seed: int) -> Tensor:
    """Return codebooks ``[count, levels]`` to begin with: blocks that are served worst get codebooks of their own.

    As in k-means++ a block is drawn with a probability in proportion to its present error. Its codebook is that of
    Lloyd-Max for the ``1/count`` of all blocks that are nearest to it, where the order of scalars in a block counts for
    nothing (it does not for a codebook).
    """
    generator = torch.Generator().manual_seed(seed)
    ordered = blocks.sort(-1).values
    books = [lloyd_max(blocks.flatten(), weights.flatten(), levels)]
    least = assign(blocks, weights, books[0][None])[1]
    for _ in range(1, count):
        shares = least.double().cpu()
        shares = shares if float(shares.sum()) > 0 else torch.ones_like(shares)
        place = torch.rand((), generator=generator, dtype=torch.float64) * shares.sum()
        drawn = min(int(torch.searchsorted(shares.cumsum(0), place)), len(blocks) - 1)
        distance = (ordered - ordered[drawn]).square().sum(-1)
        near = distance.topk(max(1, len(blocks) // count), largest=False).indices
        books.append(lloyd_max(blocks[near].flatten(), weights[near].flatten(), levels))
        least = torch.minimum(least, assign(blocks, weights, books[-1][None])[1])
    return torch.stack(books)


def lloyd_max(values: Tensor, weights: Tensor, levels: int) -> Tensor:
    """Return ``levels`` rising entries for values ``[n]``: Lloyd-Max from evenly spaced quantiles."""
    ordered = values.sort().values
    places = (torch.arange(levels, device=values.device) + 0.5) / levels * len(values)
    book = ordered[places.long().clamp(max=len(values) - 1)][None]
    none = torch.zeros(1, dtype=torch.long, device=values.device)
    for _ in range(_LLOYD):
        book = update(values[None], weights[None], book, none, whole=False)
    return book[0]


def assign(blocks: Tensor, weights: Tensor, books: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best codebook of each block, int64 ``[n]``, and its weighted squared error ``[n]``."""
    errors = torch.stack([_squares(blocks, weights, book).sum(-1) for book in books])
    least, chosen = errors.min(0)
    return chosen, least


def _squares(blocks: Tensor, weights: Tensor, book: Tensor) -> Tensor:
    values = book[nearest_entries(blocks.reshape(1, -1), book[None])].view_as(blocks)
    return values.sub_(blocks).square_().mul_(weights)


def update(blocks: Tensor, weights: Tensor, books: Tensor, chosen: Tensor, *, whole: bool) -> Tensor:
    """Return codebooks whose entries are the means of what they stand for; ``whole``: the nearest integers to them.

    An entry that stands for nothing moves to where its cluster loses most, which cannot raise the error: nothing else
    changes.

    Args:
        blocks: ``[n, size]``.
        weights: ``[n, size]``.
        books: ``[count, levels]``, rising.
        chosen: ``[n]``, the codebook of each block.
        whole: whether entries are integers.
    """
    count, levels = books.shape
    codes = torch.empty(blocks.shape, dtype=torch.long, device=blocks.device)
    for number in range(count):
        mine = chosen == number
        values = blocks[mine]
        codes[mine] = nearest_entries(values.reshape(1, -1), books[number][None]).view_as(values)
    index = (chosen[:, None] * levels + codes).flatten()
    mass = torch.bincount(index, weights.flatten(), count * levels).to(books.dtype)
    means = torch.bincount(index, (weights * blocks).flatten(), count * levels).to(books.dtype) / mass
    fresh = torch.where(mass > 0, means, books.flatten()).view_as(books)
    if whole:
        fresh = fresh.round().clamp(-TOP, TOP)
    losses = weights * (fresh.flatten()[index].view_as(blocks) - blocks).square()
    at = (chosen[:, None] * (2 * TOP + 1) + blocks.round().clamp(-TOP, TOP).long() + TOP).flatten()
    lost = torch.bincount(at, losses.flatten(), count * (2 * TOP + 1)).view(count, -1)  # by integer, in each cluster
    idle = (mass <= 0).view_as(books)
    for number in torch.nonzero(idle.any(1)).flatten().tolist():
        fresh[number] = _moved(fresh[number], idle[number], lost[number])
    return fresh.sort(-1).values


def _moved(book: Tensor, idle: Tensor, lost: Tensor) -> Tensor:
    """Move idle entries of a codebook to the integers where most is lost, none of which is an entry yet."""
    taken = book[~idle]
    free = ~torch.isin(torch.arange(-TOP, TOP + 1, device=book.device).to(book.dtype), taken)
    order = torch.where(free, lost, torch.full_like(lost, -1.0)).argsort(descending=True, stable=True)
    return torch.cat([taken, (order[: int(idle.sum())] - TOP).to(book.dtype)])


def distinct(books: Tensor) -> Tensor:
    """Return codebooks rounded to different integers in [-TOP, TOP]: of equal ones, one moves to the nearest free."""
    rounded = books.round().clamp(-TOP, TOP).long()
    rows = []
    for row in rounded.tolist():
        used: set[int] = set()
        for entry in row:
            candidates = (entry + sign * step for step in range(2 * TOP + 1) for sign in (1, -1))
            used.add(next(each for each in candidates if abs(each) <= TOP and each not in used))
        rows.append(sorted(used))
    return torch.tensor(rows, dtype=books.dtype, device=books.device)
