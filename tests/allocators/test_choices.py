"""Budgets and what they refuse, as the allocators that have one meet them."""

from dataclasses import replace

import pytest

from aptq.allocators.knapsack import Knapsack
from aptq.api import AptqError, Option
from aptq.testing.allocation import random_problem


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
        (Knapsack(budget=0.01, count="model"), "not among the layers takes 0.05 of it"),
        (Knapsack(pin={"q_proj": 4}), "no layer is left for 'q_proj'"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_the_range_and_the_reason(allocator: Knapsack, message: str) -> None:
    problem = replace(random_problem(allocator.bits, 7, 0, flat=False, with_costs=True), other_bytes=50_000)
    for attempt in (allocator.allocate, lambda each: allocator.check_problem(replace(each, costs={}))):
        with pytest.raises(AptqError, match=message.replace("(", r"\(")):
            attempt(problem)


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
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(AptqError, match=message):
        Knapsack(**options)


def test_a_budget_of_codes_cannot_weigh_options_of_one_width() -> None:
    several = [Option(3, 32, "integer"), Option(3, 64, "integer"), Option(3, 64, "float")]
    for pair in (several[:2], several[1:]):
        with pytest.raises(AptqError, match=r"allocator\.count=storage"):
            Knapsack().check_options(pair)
        Knapsack(count="storage").check_options(pair)
    Knapsack().check_options([Option(3, 32, "integer"), Option(4, 64, "float")])


def test_a_budget_of_time_is_kept_and_counts_nothing_else() -> None:
    problem = random_problem((2, 3, 4), 12, 0, flat=False, with_costs=True)
    # Three bits are slower than four: no plan of least cost has them.
    per_weight = {2: 1e-9, 3: 4e-9, 4: 3e-9}
    seconds = {
        name: {option: problem.num_weights(name) * per_weight[option.bits] for option in problem.options}
        for name in problem.shapes
    }
    timed = replace(problem, seconds=seconds)
    limit = 1e3 * 2e-9 * problem.total_weights  # half way between all at two and all at four
    plan = Knapsack(bits=(2, 3, 4), budget=limit, count="time").allocate(timed)
    taken = 1e3 * sum(seconds[name][option] for name, option in plan.items())
    assert 0.8 * limit < taken <= limit
    assert {option.bits for option in plan.values()} == {2, 4}
    with pytest.raises(AptqError, match="milliseconds a token.*or a faster backend"):
        Knapsack(bits=(2, 3, 4), budget=0.4 * limit, count="time").allocate(timed)


def test_layers_that_share_an_option_are_chosen_for_together() -> None:
    problem = random_problem((2, 3, 4), 12, 0, flat=False, with_costs=True)
    names = list(problem.shapes)
    fused = replace(problem, fused=[names[:3], names[5:7]])
    free, together = (Knapsack(bits=(2, 3, 4), budget=3).allocate(each) for each in (problem, fused))
    for group in fused.fused:
        assert len({together[name] for name in group}) == 1
    costs = [sum(problem.costs[name][option] for name, option in plan.items()) for plan in (free, together)]
    assert costs[0] <= costs[1] < 1.5 * costs[0]
    pinned = Knapsack(bits=(2, 3, 4), budget=3, pin={names[1]: 4}).allocate(fused)
    assert {pinned[name].bits for name in names[:3]} == {4}
    with pytest.raises(AptqError, match="stored as one"):
        Knapsack(bits=(2, 3, 4), budget=3, pin={names[0]: 2, names[1]: 4}).allocate(fused)
