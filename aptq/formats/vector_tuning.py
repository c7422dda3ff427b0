"""Fine-tuning of what vectors' codes stand for, codes staying as they are: by least squares, with nothing trained.

The weight is ``V[h, j, r] = d_j s_hm C[q_hjm]_r``, linear in the centroids, in the scales of columns ``d`` and in those
of vectors ``s``. So with two of them fixed the third has an exact optimum of ``J = sum_h tr((T - V)^T H_h (T - V))``.

Source: the layer-wise fine-tuning of VPTQ (Liu et al., EMNLP 2024), which is gradient descent on centroids and on the
gains of norms there; the scales of columns do here what gains would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from aptq.formats.codebooks import Codebook

_STEPS = 12
"""Of conjugate gradients a round."""


@dataclass(frozen=True, eq=False)
class Lookup:
    """Which entry of which table every vector of a weight ``[heads, in, V length]`` is made of."""

    tables: tuple[tuple[int, int], ...]  # (entries, length) of each
    uses: tuple[tuple[int, Tensor, Tensor], ...]  # (table, columns [n], entries [heads, n, vectors])

    @classmethod
    def of(cls, books: Sequence[Codebook], book: Tensor, codes: Tensor, length: int) -> Lookup:
        """Return that of codes ``[heads, in, V]`` of columns that have the codebooks ``book [in]``."""
        tables: list[tuple[int, int]] = []
        uses = []
        for number, each in enumerate(books):
            columns = (book == number).nonzero()[:, 0]
            parts = each.parts(codes[:, columns], length // each.main.shape[1])
            first, second = each.entries(parts.flatten(2))  # [heads, n, vectors of the codebook's own length]
            uses.append((len(tables), columns, first))
            tables.append((len(each.main), each.main.shape[1]))
            if each.residual is not None:
                uses.append((len(tables), columns, second))
                tables.append((len(each.residual), each.residual.shape[1]))
        return cls(tuple(tables), tuple(uses))

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return the tables that lie in a row in ``flat [sum of entries x length]``."""
        sizes = [entries * length for entries, length in self.tables]
        return [part.view(table) for part, table in zip(flat.split(sizes), self.tables, strict=True)]

    def values(self, flat: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Return the weight without scales, of ``shape [heads, in, V length]``."""
        tables, found = self.split(flat), flat.new_zeros(shape)
        for table, columns, entries in self.uses:
            found[:, columns] += tables[table][entries].flatten(2)
        return found

    def gathered(self, values: Tensor) -> Tensor:
        """Return the transpose of ``values``: for each entry the sum over where it is used."""
        sums = values.new_zeros(sum(entries * length for entries, length in self.tables))
        tables = self.split(sums)
        for table, columns, entries in self.uses:
            length = self.tables[table][1]
            tables[table].index_add_(0, entries.flatten(), values[:, columns].reshape(-1, length))
        return sums


@dataclass(frozen=True, eq=False)
class Tuned:
    """Tables in a row, and scales."""

    flat: Tensor
    columns: Tensor  # d [in]
    vectors: Tensor  # s [heads, V]

    def values(self, lookup: Lookup, length: int) -> Tensor:
        """Return the weight ``[heads, in, V length]``."""
        shape = len(self.vectors), len(self.columns), self.vectors.shape[1] * length
        return lookup.values(self.flat, shape) * spread(self.columns, self.vectors, length)


def spread(columns: Tensor, vectors: Tensor, length: int) -> Tensor:
    """Return the scale of every weight, ``[heads, in, V length]``."""
    return columns[:, None] * vectors.repeat_interleave(length, 1)[:, None]


def tune(
    begin: Tuned, lookup: Lookup, target: Tensor, hessian: Tensor, length: int, rounds: int, scales: Sequence[str]
) -> Tuned:
    """Return tables and scales of a lower ``J``: in each round every one of them at its optimum, the others fixed.

    Args:
        begin: what they are.
        lookup: of the codes.
        target: ``T [heads, in, rows]``; the last vector of a column may end behind the last row.
        hessian: ``H [heads, in, in]``, positive definite.
        length: of a vector.
        rounds: how often.
        scales: which of "column_scales" and "row_scales" there are.
    """
    state, wanted = begin, functional.pad(hessian @ target, (0, -target.shape[2] % length))
    shape = wanted.shape[0], wanted.shape[1], wanted.shape[2]
    counts = torch.arange(shape[2], device=target.device) < target.shape[2]  # rows that there are
    for _ in range(rounds):
        bare = lookup.values(state.flat, shape) * counts
        if "row_scales" in scales:
            state = replace(state, vectors=_vector_scales(state, bare, wanted, hessian, length))
        if "column_scales" in scales:
            state = replace(state, columns=_column_scales(state, bare, wanted, hessian, length))
        by = spread(state.columns, state.vectors, length) * counts

        def curved(flat: Tensor, by: Tensor = by) -> Tensor:
            return lookup.gathered(by * (hessian @ (by * lookup.values(flat, shape))))

        diagonal = lookup.gathered(by.square() * hessian.diagonal(dim1=1, dim2=2)[..., None])
        right = lookup.gathered(by * wanted)
        state = replace(state, flat=conjugate_gradients(curved, right, state.flat, diagonal, _STEPS))
    return state


def _vector_scales(state: Tuned, bare: Tensor, wanted: Tensor, hessian: Tensor, length: int) -> Tensor:
    """Return the best ``s``: each is of rows that no other scale has, ``s = (U . H T) / (U . H U)`` over them."""
    values = bare * state.columns[:, None]

    def over(products: Tensor) -> Tensor:
        summed: Tensor = products.sum(1).unflatten(-1, (-1, length)).sum(-1)
        return summed

    below = over(values * (hessian @ values))
    return torch.where(below > 0, over(values * wanted) / below, state.vectors)


def _column_scales(state: Tuned, bare: Tensor, wanted: Tensor, hessian: Tensor, length: int) -> Tensor:
    """Return the best ``d``: ``A d = b`` with ``A_jk = sum_h H_jk (U_j . U_k)`` and ``b_j = sum_h U_j . (H T)_j``."""
    values = bare * state.vectors.repeat_interleave(length, 1)[:, None]
    matrix = (hessian * (values @ values.transpose(1, 2))).sum(0).double()
    right = (values * wanted).sum((0, 2)).double()
    # Columns without weight keep the scale that they have.
    ridge = 1e-7 * matrix.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    solved: Tensor = torch.linalg.solve(
        matrix + ridge * torch.eye(len(right), device=right.device, dtype=right.dtype),
        right + ridge * state.columns.double(),
    )
    return solved.to(state.columns.dtype)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, begin: Tensor, diagonal: Tensor, steps: int
) -> Tensor:
    """Return ``x`` nearer to ``A x = right`` than ``begin``, ``A`` symmetric and positive semidefinite.

    Args:
        product: ``A x``.
        right: ``[n]``.
        begin: ``[n]``.
        diagonal: of ``A``, by which steps are evened out; where it is 0, ``x`` stays.
        steps: at most.
    """
    inverse = torch.where(diagonal > 0, 1 / diagonal, torch.zeros_like(diagonal))
    x, left = begin, right - product(begin)
    along = inverse * left
    before = left @ along
    for _ in range(steps):
        if not before > 0:
            break
        curved = product(along)
        steep = along @ curved
        if not steep > 0:
            break
        x = x + before / steep * along
        left = left - before / steep * curved
        turned = inverse * left
        after = left @ turned
        along, before = turned + after / before * along, after
    return x
