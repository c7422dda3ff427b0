"""The search for the plan that is measured to be best."""

import math
from dataclasses import replace

import numpy as np
import pytest

from aptq.allocators.knapsack import Knapsack
from aptq.allocators.measured import Measured
from aptq.allocators.perturbation import perturbation
from aptq.api import Allocation, AptqError, MeasuringAllocator, Option
from aptq.testing import check_allocator
from aptq.testing.allocation import CostJudge, random_problem

BITS = (2, 3, 4)


@pytest.mark.parametrize("budget", [2.0, 2.7, 3.0, 5.0])
def test_keeps_the_contract(budget: float) -> None:
    allocator = Measured(bits=BITS, budget=budget, rounds=2, plans=4)
    check_allocator(allocator, average_bits=budget)
    assert isinstance(allocator, MeasuringAllocator)
    assert not isinstance(Knapsack(), MeasuringAllocator)


def _problem(error: float = 0.3) -> tuple[Allocation, CostJudge]:
    """Return a problem whose costs are wrong as metrics are, and a judge who knows better."""
    problem = random_problem(BITS, 60, 3, flat=True, with_costs=True, per_block=4)
    rng = np.random.default_rng(8)

    def costs(logs: np.ndarray) -> dict[str, dict[Option, float]]:  # type: ignore[type-arg]
        loud = dict(zip(problem.shapes, np.exp(logs).tolist(), strict=True))
        return {
            name: {option: loud[name] * problem.num_weights(name) * 4.0**-option.bits for option in problem.options}
            for name in problem.shapes
        }

    predicted = perturbation(problem, rng)
    judge = CostJudge(costs(predicted + error * perturbation(problem, rng)))
    return replace(problem, costs=costs(predicted), judge=judge), judge


def test_finds_better_plans_than_the_costs_alone() -> None:
    problem, judge = _problem()
    (predicted,) = judge([Knapsack(bits=BITS, budget=3).allocate(problem)])
    (best,) = judge([Knapsack(bits=BITS, budget=3).allocate(replace(problem, costs=judge.costs))])
    (few,) = judge([Measured(bits=BITS, budget=3, rounds=2).allocate(problem)])
    (found,) = judge([Measured(bits=BITS, budget=3, rounds=30).allocate(problem)])
    assert best <= found < few < predicted
    assert found - best < 0.6 * (predicted - best)


def test_begins_with_the_predicted_plan_and_the_uniform_ones_and_measures_none_twice() -> None:
    problem, judge = _problem()
    Measured(bits=BITS, budget=3, rounds=3, plans=6).allocate(problem)
    assert judge.asked[0] == Knapsack(bits=BITS, budget=3).allocate(problem)
    assert {option.bits for option in judge.asked[1].values()} == {3}
    assert len(judge.asked) <= 2 + 3 * 6
    assert len({tuple(plan.values()) for plan in judge.asked}) == len(judge.asked)


def test_predictions_that_are_right_are_kept() -> None:
    problem, _ = _problem()
    right = replace(problem, judge=CostJudge(problem.costs))
    assert Measured(bits=BITS, budget=3).allocate(right) == Knapsack(bits=BITS, budget=3).allocate(problem)


def test_a_uniform_plan_that_is_measured_to_be_better_wins() -> None:
    problem, _ = _problem()
    uneven = {
        name: {option: 1.0 if option.bits == 3 else 99.0 for option in problem.options} for name in problem.shapes
    }
    plan = Measured(bits=BITS, budget=3, rounds=2).allocate(replace(problem, judge=CostJudge(uneven)))
    assert {option.bits for option in plan.values()} == {3}


def test_plans_that_are_not_finite_never_win() -> None:
    problem, judge = _problem()
    infinite = {name: dict.fromkeys(problem.options, math.inf) for name in problem.shapes}
    assert Measured(bits=BITS, budget=3, rounds=1).allocate(replace(problem, judge=CostJudge(infinite)))


def test_no_round_is_begun_when_time_is_up() -> None:
    problem, judge = _problem()
    judge.seconds = 61.0
    Measured(bits=BITS, budget=3, minutes=1).allocate(problem)
    assert len(judge.asked) == 2


def test_another_seed_is_another_search() -> None:
    plans = []
    for seed in (0, 0, 1):
        problem, judge = _problem()
        Measured(bits=BITS, budget=3, rounds=1, seed=seed).allocate(problem)
        plans.append(judge.asked)
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "allocator.rounds=0"),
        ({"plans": 1}, "use 2 or more"),
        ({"samples": 0}, "allocator.samples=0"),
        ({"minutes": 0.0}, "a time above 0"),
        ({"spread": 0.0}, "a standard deviation above 0"),
        ({"bits": ()}, "name different widths"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(AptqError, match=message):
        Measured(**options)


def test_without_a_model_it_says_so() -> None:
    with pytest.raises(AptqError, match="needs a model"):
        Measured(bits=BITS, budget=3).allocate(replace(_problem()[0], judge=None))
