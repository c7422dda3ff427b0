"""All budgets at once: each plan is the knapsack's; the smallest plan within a cost is the smallest of all that are."""

from dataclasses import replace
from itertools import product

import pytest

from aptq.allocators.choices import Choices
from aptq.allocators.knapsack import Knapsack
from aptq.allocators.pareto import Pareto
from aptq.api import Allocation, AptqError, FrontAllocator, Option
from aptq.testing import check_allocator
from aptq.testing.allocation import random_problem

Plan = dict[str, Option]


def problem(layers: int = 20) -> Allocation:
    return random_problem((2, 3, 4, 8), layers, 0, flat=False, with_costs=True)


def cost(of: Allocation, plan: Plan) -> float:
    return sum(of.costs[name][option] for name, option in plan.items())


def size(of: Allocation, plan: Plan) -> int:
    return sum(of.num_weights(name) * option.bits for name, option in plan.items())


@pytest.mark.parametrize("budget", [2.0, 2.5, 3.7, 8.0])
def test_keeps_the_contract(budget: float) -> None:
    check_allocator(Pareto(budget=budget), average_bits=budget)
    assert isinstance(Pareto(), FrontAllocator)


def test_every_plan_of_the_front_is_the_knapsacks() -> None:
    found = Pareto(step=0.5).front(problem())
    assert list(found) == ["2", "2.5", "3", "3.5", "4", "4.5", "5", "5.5", "6", "6.5", "7", "7.5", "8"]
    for budget, plan in found.items():
        assert plan == Knapsack(budget=float(budget)).allocate(problem())
    costs = [cost(problem(), plan) for plan in found.values()]
    assert costs == sorted(costs, reverse=True)


def test_budgets_are_in_the_unit_that_is_counted() -> None:
    found = Pareto(step=0.5, count="storage").front(problem())
    for budget, plan in found.items():
        stored = sum(problem().storage_bits[name][option] for name, option in plan.items())
        assert stored / problem().total_weights <= float(budget)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.7])
def test_the_smallest_plan_within_a_cost_is_the_smallest_of_all(share: float) -> None:
    few = problem(5)
    few = replace(few, options=few.options[:3])
    everything = [dict(zip(few.shapes, each, strict=True)) for each in product(few.options, repeat=5)]
    costs = [cost(few, plan) for plan in everything]
    limit = min(costs) + share * (max(costs) - min(costs))
    found = Pareto(max_cost=limit).allocate(few)
    assert cost(few, found) <= limit
    assert size(few, found) == min(
        size(few, plan) for plan, value in zip(everything, costs, strict=True) if value <= limit
    )


def test_a_cost_that_cannot_be_kept_is_refused_with_the_range() -> None:
    with pytest.raises(AptqError, match=r"max_cost=1e-30 cannot be kept.* between .* and .*allocator\.bits"):
        Pareto(max_cost=1e-30).allocate(problem())


def test_the_range_is_that_of_what_pins_leave() -> None:
    first, *_ = problem().shapes
    with pytest.raises(AptqError, match=r"between [\d.e+-]+ and [\d.e+-]+\. Offer"):
        Pareto(max_cost=1e-30, pin={first: 8}).allocate(problem())


def test_pins_hold_within_a_cost_and_on_the_front() -> None:
    name = next(iter(problem().shapes))
    pinned = Pareto(max_cost=1e9, pin={name: 4})
    plan = pinned.allocate(problem())
    assert plan[name].bits == 4
    assert {option.bits for other, option in plan.items() if other != name} == {2}
    assert all(each[name].bits == 4 for each in pinned.front(problem()).values())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"step": 0.0}, r"allocator\.step=0\.0"),
        ({"max_cost": -1.0}, r"allocator\.max_cost=-1\.0.*budget"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, float], told: str) -> None:
    with pytest.raises(AptqError, match=told):
        Pareto(**options)  # type: ignore[arg-type]


def test_hundreds_of_plans_are_refused() -> None:
    with pytest.raises(AptqError, match=r"step=0\.001 makes 6001 plans between 2 and 8; use 0\.03 or more"):
        Pareto(step=0.001).front(problem())


def test_choices_are_left_as_they_are() -> None:
    table: Choices = Pareto().choices(problem())
    before = table.costs.copy()
    Pareto(max_cost=1e9).allocate(problem())
    assert (table.costs == before).all()
