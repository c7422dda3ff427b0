"""Sensitivities drawn at random."""

from dataclasses import replace

import numpy as np

from aptq.allocators.perturbation import perturbation
from aptq.testing.allocation import random_problem


def test_one_a_unit_and_the_same_for_the_same_seed() -> None:
    problem = random_problem((2, 4), 40, 0, flat=False, with_costs=False, per_block=4)
    fused = replace(problem, fused=[block[:2] for block in problem.blocks()])
    for each in (problem, fused):
        drawn = [perturbation(each, np.random.default_rng(seed)) for seed in (0, 0, 1)]
        assert drawn[0].shape == (len(each.units()),)
        assert (drawn[0] == drawn[1]).all()
        assert (drawn[0] != drawn[2]).any()


def test_layers_of_a_kind_move_together() -> None:
    """Beside what each layer does by itself: kinds differ by more than layers of one kind do, on average."""
    problem = random_problem((2, 4), 400, 0, flat=False, with_costs=False, per_block=4)
    means = np.array(
        [perturbation(problem, np.random.default_rng(seed)).reshape(-1, 4).mean(axis=0) for seed in range(50)]
    )
    assert 0.8 < means.std(axis=0).mean() < 1.3, "the mean over the depth is that of the kind, whose deviation is 1"
