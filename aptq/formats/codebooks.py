"""Codebooks of vectors: how they are written down, searched and looked up."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from aptq.api import AptqError
from aptq.formats.kmeans import KMeans, nearest

_SPEC = re.compile(r"v(\d+)-k(\d+)(?:-(\d+))?")
_LONGEST, _MOST = 64, 1 << 16


@dataclass(frozen=True)
class Spec:
    """Vectors of ``length`` weights, ``centroids`` for them and, unless 0, ``residual`` ones for what is left over."""

    length: int
    centroids: int
    residual: int = 0

    @classmethod
    def parse(cls, text: str, key: str) -> Spec:
        """Read ``v8-k65536-256``: vectors of 8, 65536 centroids, 256 residual ones; ``key`` is where it was written.

        Raises:
            AptqError: it is written otherwise, or cannot be.
        """
        match = _SPEC.fullmatch(text)
        if match is None:
            raise AptqError(
                f"{key}={text!r} is no codebook; write v4-k256 for vectors of 4 weights and 256 centroids, "
                "v8-k4096-256 for 256 residual centroids beside 4096."
            )
        spec = cls(*(int(number or 0) for number in match.groups()))
        counts = [spec.centroids, *([spec.residual] if match.group(3) else [])]
        if not 1 <= spec.length <= _LONGEST or any(not 2 <= k <= _MOST or k & (k - 1) for k in counts):
            raise AptqError(
                f"{key}={text!r} is not allowed; use vectors of 1 to {_LONGEST} weights, and powers of two from 2 to "
                f"{_MOST} as numbers of centroids."
            )
        return spec

    @property
    def index_bits(self) -> int:
        """Bits of an index into the centroids."""
        return self.centroids.bit_length() - 1

    @property
    def residual_bits(self) -> int:
        """Bits of an index into the residual centroids; 0 where there are none."""
        return max(self.residual.bit_length() - 1, 0)


@dataclass(frozen=True, eq=False)
class Codebook:
    """Vectors ``main[i] + residual[r]``, whose code is ``i + len(main) r``."""

    main: Tensor  # [k, v], float32
    residual: Tensor | None = None  # [k2, v]
    beam: int = 1  # centroids, nearest first, that are tried with the residual ones

    @property
    def bits(self) -> int:
        """Bits of a code."""
        size = len(self.main) * (1 if self.residual is None else len(self.residual))
        return size.bit_length() - 1

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes ``[n]`` of ``vectors [n, t]``, and what they stand for ``[n, t]``.

        A vector may be shorter than a centroid, of which then the beginning counts, or longer: it is cut into parts,
        whose codes are put together with the first one in the lowest bits.
        """
        codes = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
        found = []
        for number, part in enumerate(vectors.split(self.main.shape[1], dim=1)):
            first, second = self.search(part)
            value = self.main[first, : part.shape[1]]
            if self.residual is not None:
                value = value + self.residual[second, : part.shape[1]]
                first = first + len(self.main) * second
            codes += first << self.bits * number
            found.append(value)
        return codes, found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def parts(self, codes: Tensor, count: int) -> Tensor:
        """Return the codes ``[..., count]`` of the parts that ``encode`` put together in each of ``codes``."""
        return codes[..., None] >> self.bits * torch.arange(count, device=codes.device) & ((1 << self.bits) - 1)

    def entries(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of centroids and of residual ones (all 0 without) that codes of single parts name."""
        return codes % len(self.main), codes // len(self.main)

    def search(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices ``[n]`` of centroids and of residual ones (all 0 without) for ``vectors [n, t]``, ``t <= v``.

        With residual centroids, each of the ``beam`` nearest centroids is tried with the one that is nearest to what it
        leaves over: exact where the beam is all of them.
        """
        main = self.main[:, : vectors.shape[1]]
        if self.residual is None:
            return nearest(vectors, main), torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
        residual = self.residual[:, : vectors.shape[1]]
        distances = torch.addmm(main.square().sum(-1) / 2, vectors, main.T, alpha=-1)
        tried = distances.topk(min(self.beam, len(main)), dim=1, largest=False).indices  # [n, beam]
        left = vectors[:, None] - main[tried]
        second = nearest(left.flatten(0, 1), residual).view_as(tried)
        best = (left - residual[second]).square().sum(-1).argmin(1, keepdim=True)
        return tried.gather(1, best)[:, 0], second.gather(1, best)[:, 0]

    def stored(self, dtype: torch.dtype) -> Codebook:
        """Return the codebook as it comes back when it was stored in ``dtype``.

        Raises:
            AptqError: it is not finite then.
        """
        main, residual = (None if each is None else each.to(dtype).float() for each in (self.main, self.residual))
        assert main is not None
        if not all(bool(each.isfinite().all()) for each in (main, residual) if each is not None):
            raise AptqError(
                f"A codebook for weights of up to {self.main.abs().max().item():.3g} is not finite in {dtype}; use "
                "format.scale_dtype=float32 or format.normalize=both, or look for NaN and Inf in the model."
            )
        return Codebook(main, residual, self.beam)

    def refined(self, vectors: Tensor, weights: Tensor, means: KMeans) -> Codebook:
        """Return the codebook that some more iterations make of this one, for ``vectors [n, v]``; see ``fitted``."""
        vectors, weights = means.drawn(vectors, weights, len(self.main))
        main = means.improve(vectors, weights, self.main)
        if self.residual is None:
            return Codebook(main)
        left = vectors - main[nearest(vectors, main)]
        return Codebook(main, means.improve(left, weights, self.residual), self.beam)


def fitted(vectors: Tensor, weights: Tensor, spec: Spec, means: KMeans, beam: int) -> Codebook:
    """Return a codebook for ``vectors [n, spec.length]`` with weights ``[n]``: k-means, and once more on the rest."""
    vectors, weights = means.drawn(vectors, weights, spec.centroids)
    main = means.fit(vectors, weights, spec.centroids)
    if not spec.residual:
        return Codebook(main)
    left = vectors - main[nearest(vectors, main)]
    return Codebook(main, means.fit(left, weights, spec.residual), beam)
