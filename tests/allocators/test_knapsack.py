"""The exact allocator."""

from dataclasses import replace

import pytest

from aptq.allocators.knapsack import Knapsack
from aptq.allocators.uniform import Uniform
from aptq.api import Option
from aptq.testing import check_allocator
from aptq.testing.allocation import random_problem


@pytest.mark.parametrize("budget", [2.0, 2.5, 3.7, 8.0])
def test_keeps_the_contract(budget: float) -> None:
    check_allocator(Knapsack(budget=budget), average_bits=budget)


@pytest.mark.parametrize("count", ["code", "storage"])
def test_is_never_dearer_than_uniform_at_the_same_size(count: str) -> None:
    problem = random_problem((2, 3, 4), 30, 0, flat=False, with_costs=True)
    only = replace(problem, options=[Option(3, 64)])
    uniform = Uniform(bits=3).allocate(only)
    size = sum(problem.storage_bits[name][option] for name, option in uniform.items()) / problem.total_weights
    plan = Knapsack(bits=(2, 3, 4), budget=3.0 if count == "code" else size, count=count).allocate(problem)
    assert sum(problem.costs[n][o] for n, o in plan.items()) < sum(problem.costs[n][o] for n, o in uniform.items())
