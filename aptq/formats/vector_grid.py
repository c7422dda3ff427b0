"""The grid of format ``vector``: the codebooks and scales of one weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from aptq.api import QuantizedWeight
from aptq.formats.codebooks import Codebook, Spec, fitted
from aptq.formats.grouped import by_output
from aptq.formats.kmeans import KMeans
from aptq.formats.vector_tuning import Lookup, Tuned, tune

SCALES = {
    "none": (),
    "columns": ("column_scales",),
    "rows": ("row_scales",),
    "both": ("column_scales", "row_scales"),
}
"""What is stored for each way to normalise."""


@dataclass(frozen=True, eq=False, kw_only=True)
class VectorGrid:
    """Codebooks of the groups of columns (and of outliers), and scales, of one weight ``[heads, rows, in]``.

    A column's ``rows`` are cut into ``V`` vectors of ``length``, the last of which may be shorter. A code is that of a
    whole vector: where the column's codebook has shorter ones, theirs side by side.
    """

    books: tuple[Codebook, ...]
    outliers: Tensor  # [outliers], rising: columns that have the last codebook
    book: Tensor  # [in]: which codebook each column has, in natural order as all but ``order``
    column_scale: Tensor  # [in]; 1 where columns are not normalised
    row_scale: Tensor  # [heads, V]; likewise
    normalize: str
    importance: Tensor  # [heads, in]
    order: Tensor  # [heads, in]: column at each position
    rows: int
    length: int
    dtype: torch.dtype  # of what is stored
    means: KMeans
    refits: int  # how often the codebooks may still be fitted anew
    finetune: int  # rounds in which all is fitted to the chosen codes

    def permuted(self, order: Tensor) -> VectorGrid:
        """Return the grid with position ``j`` of head ``h`` being this grid's column ``order[h, j]``."""
        return replace(self, order=self.order.gather(1, order))

    def round(self, values: Tensor, position: int | slice) -> tuple[Tensor, Tensor]:
        """Round columns, a code for each vector; see ``aptq.api.Grid.round``."""
        if isinstance(position, int):
            codes, found = self.round(values[:, None], slice(position, position + 1))
            return codes[:, 0], found[:, 0]
        columns = self.order[:, position]  # [heads, n]
        scale = self.row_scale[:, None] * self.column_scale[columns][..., None]  # [heads, n, V]
        exact = values.float()
        if len(self.books) == 1:
            codes, found = self._encode(exact, scale, self.books[0])
            return codes, found.to(values.dtype)
        codes = torch.empty(scale.shape, dtype=torch.int64, device=values.device)
        found = torch.empty_like(exact)
        book = self.book[columns]
        for number in book.unique().tolist():
            mine = book == number
            codes[mine], found[mine] = self._encode(exact[mine], scale[mine], self.books[number])
        return codes, found.to(values.dtype)

    def _encode(self, values: Tensor, scale: Tensor, book: Codebook) -> tuple[Tensor, Tensor]:
        """Return codes ``[..., V]`` and values ``[..., rows]`` for ``values [..., rows]`` and ``scale [..., V]``."""
        whole = self.rows // self.length
        parts = [(values[..., : whole * self.length].unflatten(-1, (whole, self.length)), scale[..., :whole])]
        if self.rows % self.length:
            parts.append((values[..., None, whole * self.length :], scale[..., whole:]))
        codes, found = [], []
        for vectors, by in parts:
            code, value = book.encode((vectors / by[..., None]).flatten(0, -2))
            codes.append(code.view(by.shape))
            found.append((value.view(vectors.shape) * by[..., None]).flatten(-2))
        return (codes[0], found[0]) if len(parts) == 1 else (torch.cat(codes, -1), torch.cat(found, -1))

    def fitted(self, columns: Tensor, specs: Sequence[Spec], beam: int) -> VectorGrid:
        """Return the grid with codebooks for ``columns [heads, in, rows]``, in natural order, by k-means."""
        parts = zip(self._vectors(columns, [spec.length for spec in specs]), specs, strict=True)
        books = [fitted(vectors, weights, spec, self.means, beam) for (vectors, weights), spec in parts]
        return replace(self, books=tuple(book.stored(self.dtype) for book in books))

    def refit(self, columns: Tensor) -> VectorGrid | None:
        """Return the grid with codebooks fitted to columns as the quantizer met them; see ``aptq.api.RefitGrid``."""
        if not self.refits:
            return None
        parts = zip(self._vectors(columns, [book.main.shape[1] for book in self.books]), self.books, strict=True)
        books = [book.refined(vectors, weights, self.means) for (vectors, weights), book in parts]
        return replace(self, books=tuple(book.stored(self.dtype) for book in books), refits=self.refits - 1)

    @property
    def tunes(self) -> bool:
        """Whether there are rounds of it."""
        return self.finetune > 0

    def tuned(self, codes: Tensor, target: Tensor, hessian: Tensor) -> VectorGrid:
        """Return the grid with codebooks and scales fitted to the codes; see ``aptq.api.TunedGrid``.

        They are rounded to what is stored, which may lose more than was won: then it is this grid.
        """
        lookup = Lookup.of(self.books, self.book, codes, self.length)
        begin = self._as_tuned()
        found = tune(begin, lookup, target.float(), hessian, self.length, self.finetune, SCALES[self.normalize])
        parts = iter(lookup.split(found.flat))
        books = tuple(
            Codebook(next(parts), None if book.residual is None else next(parts), book.beam).stored(self.dtype)
            for book in self.books
        )
        scales = [scale.to(self.dtype).float() for scale in (found.columns, found.vectors)]
        grid = replace(self, books=books, column_scale=scales[0], row_scale=scales[1], finetune=0)
        return min((self, grid), key=lambda each: each._loss(lookup, target, hessian))

    def _loss(self, lookup: Lookup, target: Tensor, hessian: Tensor) -> float:
        """Return ``sum_h tr((T - V)^T H (T - V))``; infinity where scales are not finite."""
        values = self._as_tuned().values(lookup, self.length)
        left = target.float() - values[..., : self.rows]
        loss = (left * (hessian @ left)).sum(dtype=torch.float64).item()
        return loss if math.isfinite(loss) else math.inf

    def _as_tuned(self) -> Tuned:
        tables = [table.flatten() for book in self.books for table in (book.main, book.residual) if table is not None]
        return Tuned(torch.cat(tables), self.column_scale, self.row_scale)

    def _vectors(self, columns: Tensor, lengths: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each codebook its vectors ``[n, length]``, scaled, and what an error in them costs ``[n]``."""
        scale = self.row_scale[:, None] * self.column_scale[:, None]  # [heads, in, V]
        padded = functional.pad(columns.float(), (0, -self.rows % self.length))
        vectors = padded.unflatten(-1, (-1, self.length)) / scale[..., None]
        weights = self.importance[..., None] * scale.square()
        for number, length in enumerate(lengths):
            mine = self.book == number
            parts = self.length // length
            yield vectors[:, mine].reshape(-1, length), weights[:, mine].flatten().repeat_interleave(parts)

    def finish(self, codes: Tensor) -> QuantizedWeight:
        """Bind codes ``[heads, in, V]`` to codebooks and scales, columns back in their natural order."""
        natural = by_output(codes, self.order)  # [vectors of the layer, in]
        groups = self.books[: len(self.books) - bool(len(self.outliers))]
        parameters = self._scales() | {"codebook": self._stored([book.main for book in groups])}
        common = natural[:, self.book < len(groups)]
        first, second = groups[0].entries(common)
        if groups[0].residual is not None:
            parameters["residual_codebook"] = self._stored([b.residual for b in groups if b.residual is not None])
            parameters["residual_codes"] = second
        if len(self.outliers):
            finer = self.books[-1]
            split = finer.parts(natural[:, self.outliers], self.length // finer.main.shape[1]).transpose(1, 2)
            count = -(-len(codes) * self.rows // finer.main.shape[1])
            parameters["outlier_codebook"] = self._stored([finer.main])[0]
            parameters["outlier_codes"] = split.flatten(0, 1)[:count]
            parameters["outlier_columns"] = self.outliers.int()
        return QuantizedWeight(codes=first, parameters=parameters)

    def _scales(self) -> dict[str, Tensor]:
        """Return the scales as they are stored, and the number of outputs."""
        scales = {"column_scales": self.column_scale, "row_scales": self.row_scale.flatten()}
        stored = {name: scales[name].to(self.dtype) for name in SCALES[self.normalize]}
        return stored | {"out_features": torch.tensor(len(self.row_scale) * self.rows)}

    def _stored(self, books: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(books)).to(self.dtype)
