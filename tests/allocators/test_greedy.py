"""The allocator of single steps."""

import pytest

from aptq.allocators.greedy import Greedy
from aptq.allocators.knapsack import Knapsack
from aptq.api import AptqError
from aptq.testing import check_allocator
from aptq.testing.allocation import random_problem


@pytest.mark.parametrize("budget", [2.0, 2.5, 3.7, 8.0])
def test_keeps_the_contract(budget: float) -> None:
    check_allocator(Greedy(budget=budget), average_bits=budget)


@pytest.mark.parametrize("seed", range(5))
def test_is_nearly_as_good_as_the_exact_plan(seed: int) -> None:
    problem = random_problem((2, 3, 4, 8), 200, seed, flat=False, with_costs=True)
    cost = {
        kind: sum(problem.costs[name][option] for name, option in kind(budget=3.3).allocate(problem).items())
        for kind in (Greedy, Knapsack)
    }
    assert cost[Knapsack] <= cost[Greedy] <= 1.01 * cost[Knapsack]


def test_options_and_budgets_are_checked_as_everywhere() -> None:
    with pytest.raises(AptqError, match="use one of code, storage, model"):
        Greedy(count="bits")
    problem = random_problem((3, 4), 7, 0, flat=False, with_costs=True)
    with pytest.raises(AptqError, match="between 3 and 4"):
        Greedy(bits=(3, 4), budget=2.5).allocate(problem)
