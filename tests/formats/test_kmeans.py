"""Weighted k-means, against brute force."""

import itertools

import pytest
import torch
from torch import Tensor

from aptq.formats.kmeans import KMeans, assign, initial, nearest, update


def _data(n: int = 400, v: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, v, generator=generator, dtype=torch.float64)
    return vectors, torch.rand(n, generator=generator, dtype=torch.float64) ** 3


def _objective(vectors: Tensor, weights: Tensor, centroids: Tensor) -> float:
    return float((torch.cdist(vectors, centroids).amin(1).square() * weights).sum())


@pytest.mark.parametrize("n", [1, 7, 5000])
def test_the_nearest_centroid_is_that_of_all_distances(n: int) -> None:
    """5000 vectors and 512 centroids are more distances than one chunk holds."""
    vectors, _ = _data(n)
    centroids = _data(512, seed=1)[0]
    labels, squares = assign(vectors, centroids)
    distances = (vectors[:, None] - centroids).square().sum(-1)
    assert torch.equal(nearest(vectors, centroids), labels)
    assert torch.equal(labels, distances.argmin(1))
    assert torch.allclose(squares, distances.amin(1))


def test_the_update_is_the_weighted_mean_of_each_cluster() -> None:
    vectors, weights = _data()
    centroids = vectors[:10]
    labels, squares = assign(vectors, centroids)
    means = update(vectors, weights, labels, squares * weights, centroids)
    for number in range(10):
        mine = labels == number
        expected = (vectors[mine] * weights[mine, None]).sum(0) / weights[mine].sum()
        assert torch.allclose(means[number], expected)


def test_the_objective_never_rises() -> None:
    vectors, weights = _data()
    centroids = vectors[:20]
    before = _objective(vectors, weights, centroids)
    for _ in range(15):
        centroids = KMeans(iterations=1).improve(vectors, weights, centroids)
        now = _objective(vectors, weights, centroids)
        assert now <= before * (1 + 1e-12)
        before = now


def test_finds_the_weighted_optimum_of_few_points() -> None:
    """Of all ways to part seven points in two, from all pairs of points on: the best, which depends on the weights."""
    vectors, weights = _data(7, 2)

    def cost(part: tuple[int, ...]) -> float:
        mine = torch.zeros(7, dtype=torch.bool)
        mine[list(part)] = True
        sides = [(vectors[side], weights[side]) for side in (mine, ~mine)]
        return sum(float((w * (x - (w @ x) / w.sum()).square().sum(1)).sum()) for x, w in sides)

    best = min(cost(part) for size in range(1, 4) for part in itertools.combinations(range(7), size))
    means = KMeans(tolerance=0.0)
    found = min(
        _objective(vectors, weights, means.improve(vectors, weights, vectors[list(pair)]))
        for pair in itertools.combinations(range(7), 2)
    )
    assert found == pytest.approx(best)


def test_weights_count_as_repeated_vectors_do() -> None:
    vectors, _ = _data(50)
    times = torch.arange(50) % 4
    repeated = vectors.repeat_interleave(times, 0)
    one = KMeans().improve(vectors, times.double(), vectors[:5])
    other = KMeans().improve(repeated, torch.ones(len(repeated), dtype=torch.float64), vectors[:5])
    assert torch.allclose(one, other)


def test_empty_clusters_move_to_where_the_error_is() -> None:
    vectors, weights = _data()
    far = torch.full((3, 3), 100.0, dtype=torch.float64)
    stuck = torch.cat([vectors[:5], far])
    found = KMeans(iterations=30, tolerance=0.0).improve(vectors, weights, stuck)
    assert bool((found < 50).all())
    assert _objective(vectors, weights, found) < _objective(vectors, weights, vectors[:5])


def test_draws_by_weight_and_no_vector_twice() -> None:
    vectors, weights = _data(60)
    weights[20:] = 0
    chosen = initial(vectors, weights, 20, torch.Generator().manual_seed(0))
    assert {tuple(row) for row in chosen.tolist()} == {tuple(row) for row in vectors[:20].tolist()}


def test_is_the_same_with_the_same_seed_only() -> None:
    vectors, weights = _data()
    first, again, other = (KMeans(seed=seed).fit(vectors, weights, 8) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_many_vectors_are_sampled() -> None:
    vectors, weights = _data(2000)
    drawn, theirs = KMeans(samples=10).drawn(vectors, weights, 8)
    assert drawn.shape == (80, 3)
    assert theirs.shape == (80,)
    assert KMeans(samples=1000).drawn(vectors, weights, 8)[0] is vectors


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_fewer_vectors_than_centroids_and_no_weights(weight: float) -> None:
    vectors, _ = _data(5)
    found = KMeans().fit(vectors, torch.full((5,), weight, dtype=torch.float64), 16)
    assert found.shape == (16, 3)
    assert _objective(vectors, torch.ones(5, dtype=torch.float64), found) == pytest.approx(0, abs=1e-20)
