"""The linear relaxation that budgets are solved by."""

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from aptq.allocators.choices import Choices
from aptq.allocators.relaxation import efficient_steps, relaxed
from aptq.api import Option


def table(costs: NDArray[np.float64], sizes: NDArray[np.int64], limit: int) -> Choices:
    options = [Option(bits, 64) for bits in range(1, costs.shape[1] + 1)]
    units = [[f"layer{row}"] for row in range(len(costs))]
    return Choices(units=units, options=options, costs=costs, sizes=sizes, limit=limit)


@st.composite
def tables(draw: st.DrawFn) -> Choices:
    """Small problems: costs over many magnitudes, some options forbidden, sizes in any order, a budget that is met."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    sizes = rng.integers(1, 40, (rows, columns))
    costs = rng.random((rows, columns)) * 10.0 ** rng.normal(0, 2, (rows, 1))
    costs[:, 1:][rng.random((rows, columns - 1)) < 0.15] = np.inf
    least = int(np.where(np.isfinite(costs), sizes, 10**6).min(axis=1).sum())
    return table(costs, sizes, draw(st.integers(least, int(sizes.max(axis=1).sum()) + 1)))


def cheapest(problem: Choices) -> float:
    """Return the least cost within the limit, by trying everything."""
    everything = (np.array(each) for each in product(range(len(problem.options)), repeat=len(problem.units)))
    return min(problem.cost(each) for each in everything if problem.size(each) <= problem.limit)


@settings(max_examples=150, deadline=None)
@given(tables())
def test_the_plan_keeps_the_limit_and_the_bound_is_below_every_plan(problem: Choices) -> None:
    chosen, bound = relaxed(problem)
    best = cheapest(problem)
    assert problem.size(chosen) <= problem.limit
    assert bound.value <= best * (1 + 1e-9)
    assert problem.cost(chosen) >= best * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(tables())
def test_reduced_costs_bound_every_plan_that_takes_the_option(problem: Choices) -> None:
    _, bound = relaxed(problem)
    for each in product(range(len(problem.options)), repeat=len(problem.units)):
        chosen = np.array(each)
        cost = problem.cost(chosen)
        if problem.size(chosen) <= problem.limit and np.isfinite(cost):
            worst = np.take_along_axis(bound.reduced, chosen[:, None], axis=1).max()
            assert cost >= (bound.value + worst) * (1 - 1e-9) - 1e-12


@settings(max_examples=60, deadline=None)
@given(tables())
def test_every_prefix_of_the_steps_is_the_best_plan_of_its_size(problem: Choices) -> None:
    steps = efficient_steps(problem.costs, problem.sizes)
    assert (np.diff(steps.price) <= 0).all()
    for count in range(len(steps.row) + 1):
        chosen = steps.after(count)
        size = problem.size(chosen)
        assert size == problem.size(steps.start) + steps.size[:count].sum()
        best = cheapest(table(problem.costs, problem.sizes, size))
        assert problem.cost(chosen) <= best * (1 + 1e-9)


def test_options_above_the_hull_are_no_steps() -> None:
    # 3 bits saves less per bit than going on to 4: the step goes from 2 to 4 at once; 8 bits costs more than 4
    steps = efficient_steps(np.array([[10.0, 9.0, 1.0, 2.0]]), np.array([[2, 3, 4, 8]]))
    assert steps.start.tolist() == [0]
    assert steps.column.tolist() == [2]
    assert steps.price.tolist() == [4.5]
