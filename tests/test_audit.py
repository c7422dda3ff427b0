"""The audit of what a metric predicts."""

import logging

import pytest

from aptq.allocators.knapsack import Knapsack
from aptq.api import Allocation, Option
from aptq.audit import Candidate, audit, candidates, preferred
from aptq.testing.allocation import random_problem


def _problem() -> tuple[Allocation, dict[str, Option]]:
    problem = random_problem((2, 3, 4), 40, 0, flat=False, with_costs=True)
    return problem, Knapsack(bits=(2, 3, 4), budget=3.2).allocate(problem)


def _size(problem: Allocation, candidate: Candidate) -> int:
    return sum(problem.storage_bits[name][option] for name, option in candidate.plan.items())


def test_candidates_are_feasible_different_and_repeatable() -> None:
    problem, chosen = _problem()
    found = candidates(problem, chosen, 8, seed=0)
    assert [each.kind for each in found] == ["chosen", "uniform", *["random"] * 8]
    assert {option.bits for option in found[1].plan.values()} == {3}
    limit, smallest = _size(problem, found[0]), sum(min(options.values()) for options in problem.storage_bits.values())
    sizes = [_size(problem, each) for each in found]
    assert all(smallest < size <= limit for size in sizes)
    random = sizes[2:]
    assert max(random) - min(random) > 0.1 * (limit - smallest)
    assert len({tuple(each.plan.values()) for each in found}) == 10
    assert found == candidates(problem, chosen, 8, seed=0) != candidates(problem, chosen, 8, seed=1)


def test_a_budget_below_every_uniform_plan_has_none() -> None:
    problem = random_problem((3, 4), 7, 0, flat=False, with_costs=True)
    chosen = Knapsack(bits=(3, 4), budget=3).allocate(problem)
    assert [each.kind for each in candidates(problem, chosen, 2, seed=0)] == ["chosen", "random", "random"]


def test_a_metric_that_is_right_has_slope_and_correlation_one(caplog: pytest.LogCaptureFixture) -> None:
    problem, chosen = _problem()
    audited = candidates(problem, chosen, 8, seed=0)
    costs = [sum(problem.costs[name][option] for name, option in each.plan.items()) for each in audited]
    figures = audit(problem, audited, [2 * cost for cost in costs])
    assert figures["spearman"] == pytest.approx(1)
    assert figures["slope"] == pytest.approx(2)
    assert [row["predicted"] for row in figures["plans"]] == costs
    assert figures["plans"][1]["kind"] == "uniform"
    assert 3 < figures["plans"][0]["storage_bits"] < 6
    assert not caplog.records


def test_a_plan_that_came_twice_counts_once() -> None:
    problem, chosen = _problem()
    audited = candidates(problem, chosen, 6, seed=0)
    measured = [1.0, 2.0, 1.5, 4.0, 3.0, 5.0, 2.5, 7.0]
    again = [Candidate(kind="random", plan=dict(each.plan)) for each in audited[:2]]
    once, twice = audit(problem, audited, measured), audit(problem, [*audited, *again], [*measured, *measured[:2]])
    assert len(twice["plans"]) == 10
    for key in ("spearman", "size_spearman", "slope"):
        assert twice[key] == pytest.approx(once[key])


def test_a_metric_that_orders_nothing_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    problem, chosen = _problem()
    audited = candidates(problem, chosen, 8, seed=0)
    costs = [sum(problem.costs[name][option] for name, option in each.plan.items()) for each in audited]
    with caplog.at_level(logging.WARNING):
        assert audit(problem, audited, [-cost for cost in costs])["spearman"] == pytest.approx(-1)
    assert "not to be trusted" in caplog.text


def test_a_plan_that_is_measured_to_lose_to_uniform_is_not_handed_out(caplog: pytest.LogCaptureFixture) -> None:
    problem, chosen = _problem()
    audited = candidates(problem, chosen, 2, seed=0)
    assert preferred(audited, [0.2, 0.3, 0.1, 0.1]).kind == "chosen"
    assert not caplog.records
    assert preferred(audited, [0.3, 0.2, 0.1, 0.1]).kind == "uniform"
    assert "worse than the same bits everywhere" in caplog.text
    assert preferred(audited[:1], [0.3]).kind == "chosen"
