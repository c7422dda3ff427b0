"""Weighted k-means on tensors of any device: what vector codebooks are fitted with.

Libraries have it without weights (SciPy), on one kind of device (scikit-learn, cuML) or not at all (PyTorch).
Sources: Lloyd (1982) for the iteration; Efraimidis and Spirakis (2006) for sampling by weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DISTANCES = {"cpu": 1 << 20, "other": 1 << 26}
"""Distances in memory at a time: what a processor's cache holds, and what keeps an accelerator busy."""


@dataclass(frozen=True)
class KMeans:
    """How clusters are searched for: at most ``iterations``, until the objective falls by less than ``tolerance``.

    ``tolerance`` is a share of the objective. ``drawn`` takes at most ``samples`` vectors for each centroid.
    """

    iterations: int = 20
    tolerance: float = 1e-3
    samples: int = 256
    seed: int = 0

    def drawn(self, vectors: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return ``samples * count`` of ``vectors [n, v]`` and their weights ``[n]``; all where there are no more."""
        wanted = self.samples * count
        if len(vectors) <= wanted:
            return vectors, weights
        chosen = torch.randperm(len(vectors), generator=self._random())[:wanted].to(vectors.device)
        return vectors[chosen], weights[chosen]

    def fit(self, vectors: Tensor, weights: Tensor, count: int) -> Tensor:
        """Return centroids ``[count, v]`` of ``vectors [n, v]`` with weights ``[n]``, from random vectors on.

        Vectors of weight 0 count for nothing, unless all are such: then they all weigh the same. Where there are fewer
        vectors than centroids, some centroids are equal.
        """
        weights = weights if bool((weights > 0).any()) else torch.ones_like(weights)
        return self.improve(vectors, weights, initial(vectors, weights, count, self._random()))

    def _random(self) -> torch.Generator:
        """Return the processor's random numbers, which are the same whatever device the vectors are on."""
        return torch.Generator().manual_seed(self.seed)

    def improve(self, vectors: Tensor, weights: Tensor, centroids: Tensor) -> Tensor:
        """Return better centroids than the given ones ``[count, v]`` for ``vectors [n, v]`` with weights ``[n]``."""
        before = float("inf")
        for _ in range(self.iterations):
            labels, squares = assign(vectors, centroids)
            costs = squares * weights
            now = float(costs.sum(dtype=torch.float64))
            if before - now <= self.tolerance * now:
                break
            before = now
            centroids = update(vectors, weights, labels, costs, centroids)
        return centroids


def initial(vectors: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` vectors by weight, none twice as long as there are others with a weight.

    The ``count`` largest of ``log(u) / w``, with ``u`` uniform, are a weighted sample without replacement.
    """
    uniform = torch.rand(len(vectors), generator=generator, dtype=torch.float64).clamp_(min=1e-300)
    keys = (uniform.log() / weights.double().cpu()).nan_to_num(nan=float("-inf"))
    # In their own order, so that weights that differ by a rounding error do not give other indices.
    chosen = keys.topk(min(count, len(vectors))).indices.sort().values.to(vectors.device)
    return vectors[chosen.repeat(-(-count // len(chosen)))[:count]].clone()


def assign(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest centroid's index ``[n]`` for ``vectors [n, v]``, and the squared distance to it ``[n]``.

    ``argmin ||x - c||^2 = argmin ||c||^2 / 2 - x c^T``: one matrix product for each chunk of vectors.
    """
    labels = nearest(vectors, centroids)
    return labels, (vectors - centroids[labels]).square().sum(-1)


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Return the index ``[n]`` of the nearest of ``centroids [k, v]`` for each of ``vectors [n, v]``."""
    half = centroids.square().sum(-1) / 2
    chunk = max(1, _DISTANCES.get(vectors.device.type, _DISTANCES["other"]) // len(centroids))
    parts = [torch.addmm(half, part, centroids.T, alpha=-1).argmin(-1) for part in vectors.split(chunk)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def update(vectors: Tensor, weights: Tensor, labels: Tensor, costs: Tensor, centroids: Tensor) -> Tensor:
    """Return the weighted means of the clusters ``[k, v]``; those without weight move to the costliest vectors.

    Summed over sorted vectors, which gives the same on every run, as adding to one place from many threads does not.

    Args:
        vectors: ``[n, v]``.
        weights: ``[n]``.
        labels: ``[n]``, of the cluster that each is in.
        costs: ``[n]``, weight times squared distance: the costliest vectors are where a centroid gains most.
        centroids: ``[k, v]``, what they were.
    """
    count = len(centroids)
    weighted = torch.cat([vectors * weights[:, None], weights[:, None]], dim=1)
    order = labels.argsort(stable=True)
    sums = torch.segment_reduce(weighted[order], "sum", lengths=torch.bincount(labels, minlength=count), axis=0)
    total = sums[:, -1:]
    means = torch.where(total > 0, sums[:, :-1] / total, centroids)
    empty = (total[:, 0] <= 0).nonzero()[:, 0]
    taken = min(len(empty), len(vectors))
    means[empty[:taken]] = vectors[costs.topk(taken).indices]
    return means
