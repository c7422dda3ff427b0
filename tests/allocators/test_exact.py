"""The exact solver."""

import numpy as np
from hypothesis import given, settings

from aptq.allocators.choices import Choices
from aptq.allocators.exact import solve
from aptq.allocators.relaxation import relaxed
from tests.allocators.test_relaxation import cheapest, table, tables


@settings(max_examples=150, deadline=None)
@given(tables())
def test_equals_trying_everything(problem: Choices) -> None:
    chosen = solve(problem)
    assert problem.size(chosen) <= problem.limit
    assert problem.cost(chosen) <= cheapest(problem) * (1 + 1e-5)


def test_beats_the_relaxation_where_a_step_does_not_fit() -> None:
    # The first step by price (4 a unit) leaves 3 units useless; the other two together save more
    problem = table(np.array([[24.0, 0.0], [15.0, 0.0], [14.0, 0.0]]), np.array([[0, 6], [0, 5], [0, 4]]), limit=9)
    assert problem.cost(relaxed(problem)[0]) == 29.0
    assert solve(problem).tolist() == [0, 1, 1]


def test_ten_thousand_layers_of_eight_options_are_proven_to_a_millionth() -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 200, (10_000, 1)) * 4096 * 16
    bits = np.arange(1, 9)
    noise = np.exp(rng.normal(0, 2, (10_000, 1)) + rng.normal(0, 0.2, (10_000, 8)))
    problem = table(noise * weights * 4.0**-bits, weights * bits, int(3.3 * weights.sum()))
    chosen, (_, bound) = solve(problem), relaxed(problem)
    assert problem.size(chosen) <= problem.limit
    assert problem.cost(chosen) <= bound.value * (1 + 1e-6)
