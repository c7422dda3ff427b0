"""Codebooks for clusters of blocks, designed by turns: the mathematics of LO-BCQ.

For blocks ``y``, whose scales are divided out, weights ``u`` and clusters ``c``:

    c(b) = argmin_c sum_i u_bi min_k (y_bi - C_ck)^2                 (each block goes to its best codebook)
    C_ck = sum u_bi y_bi / sum u_bi  over the y_bi of cluster c whose nearest entry is k    (Lloyd-Max)

Neither step can raise the error ``J = sum_b sum_i u_bi (y_bi - Q_c(b)(y_bi))^2``.

Source: Elangovan et al., "LO-BCQ: Locally Optimal Block Clustered Quantization" (arXiv 2502.05376), whose two steps
these are; the initialization, what becomes of idle entries and the rounding to integers are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aptq.formats.block_clusters import TOP, nearest_entries

_LLOYD = 20  # iterations of Lloyd-Max where a codebook begins


@dataclass(frozen=True, eq=False)
class Design:
    """Codebooks designed for some blocks, and the mean squared error ``J / sum u`` after every iteration."""

    real: Tensor  # [count, levels]: before they were rounded, rising
    entries: Tensor  # [count, levels]: integers in [-TOP, TOP], rising
    errors: tuple[float, ...]  # over the reals: never rises
    integer_errors: tuple[float, ...]  # over the integers: never rises either


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
