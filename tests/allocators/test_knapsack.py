"""The exact allocator."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from aptq.allocators.choices import Choices
from aptq.allocators.knapsack import Knapsack, solve
from aptq.allocators.relaxation import relaxed
from aptq.allocators.uniform import Uniform
from aptq.api import AptqError, Option
from aptq.testing import check_allocator
from aptq.testing.allocation import random_problem
from tests.allocators.test_relaxation import cheapest, table, tables


@pytest.mark.parametrize("budget", [2.0, 2.5, 3.7, 8.0])
def test_keeps_the_contract(budget: float) -> None:
    check_allocator(Knapsack(budget=budget), average_bits=budget)


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


@pytest.mark.parametrize("count", ["code", "storage"])
def test_is_never_dearer_than_uniform_at_the_same_size(count: str) -> None:
    problem = random_problem((2, 3, 4), 30, 0, flat=False, with_costs=True)
    only = replace(problem, options=[Option(3, 64)])
    uniform = Uniform(bits=3).allocate(only)
    size = sum(problem.storage_bits[name][option] for name, option in uniform.items()) / problem.total_weights
    plan = Knapsack(bits=(2, 3, 4), budget=3.0 if count == "code" else size, count=count).allocate(problem)
    assert sum(problem.costs[n][o] for n, o in plan.items()) < sum(problem.costs[n][o] for n, o in uniform.items())


def test_model_budgets_count_everything_else() -> None:
    problem = replace(random_problem((2, 4), 20, 1, flat=False, with_costs=True), other_bytes=50_000)
    megabytes = 0.05 + 3.4 * problem.total_weights / 8e6
    plan = Knapsack(bits=(2, 4), budget=megabytes, count="model").allocate(problem)
    stored = sum(problem.storage_bits[name][option] for name, option in plan.items())
    assert 0.98 * megabytes * 1e6 < 50_000 + stored / 8 <= megabytes * 1e6


def test_pins_hold() -> None:
    problem = random_problem((2, 3, 4), 7, 0, flat=False, with_costs=True)
    plan = Knapsack(bits=(2, 3, 4), budget=3.2, pin={"*.0.linear": 2, "*.1.*": 4, "*.linear": 3}).allocate(problem)
    assert plan["model.layers.0.linear"].bits == 2, "the first pattern counts"
    assert plan["model.layers.1.linear"].bits == 4
    assert {option.bits for name, option in plan.items() if "s.0." not in name and "s.1." not in name} == {3}


@pytest.mark.parametrize(
    ("allocator", "message"),
    [
        (Knapsack(bits=(3, 4), budget=2.9), "between 3 and 4. Offer fewer bits"),
        (
            Knapsack(bits=(2, 4), budget=2.5, pin={"*": 4}),
            "between 4 and 4. Without allocator.pin it could be had: from 2",
        ),
        (Knapsack(budget=0.01, count="model"), "not quantized takes 0.05 of it"),
        (Knapsack(pin={"q_proj": 4}), "no layer is left for 'q_proj'"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_the_range_and_the_reason(allocator: Knapsack, message: str) -> None:
    problem = random_problem(allocator.bits, 7, 0, flat=False, with_costs=True)
    with pytest.raises(AptqError, match=message.replace("(", r"\(")):
        allocator.allocate(replace(problem, other_bytes=50_000))


def test_costs_that_are_blind_to_bits_are_refused() -> None:
    problem = random_problem((2, 4), 7, 2, flat=True, with_costs=True)
    with pytest.raises(AptqError, match="allocator=ratio"):
        Knapsack(bits=(2, 4), budget=3).allocate(problem)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": ()}, "name different widths"),
        ({"bits": (2, 2)}, "name different widths"),
        ({"budget": 0.0}, "above 0"),
        ({"count": "bytes"}, "use one of code, storage, model"),
        ({"pin": {"*": 5}}, "does not offer"),
        ({"group_sizes": (64, 64), "count": "storage"}, "different sizes"),
        ({"group_sizes": (0,), "count": "storage"}, "from 1 up"),
        ({"group_sizes": (32, 64)}, "allocator.count=storage"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(AptqError, match=message):
        Knapsack(**options)
