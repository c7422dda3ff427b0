"""What a plan was chosen by."""

import pytest

from aptq.allocators.knapsack import Knapsack
from aptq.api import Option
from aptq.report.sensitivity import audit_of, trade_off
from aptq.testing.allocation import random_problem


def test_the_curve_is_below_every_plan_and_meets_the_ends() -> None:
    problem = random_problem((2, 3, 4), 20, 0, flat=False, with_costs=True)
    plan = Knapsack(bits=(2, 3, 4), budget=3.2).allocate(problem)
    costs = {
        name: {option: (problem.storage_bits[name][option], problem.costs[name][option]) for option in problem.options}
        for name in problem.shapes
    }
    found = trade_off(costs, plan, {name: problem.num_weights(name) for name in plan})
    assert found is not None
    bits, values = zip(*found.curve, strict=True)
    assert list(bits) == sorted(bits)
    assert list(values) == sorted(values, reverse=True)
    two, three, four = found.uniform
    assert (bits[0], values[0]) == pytest.approx((two.bits, two.cost))
    assert (bits[-1], values[-1]) == pytest.approx((four.bits, four.cost))
    assert min(value for at, value in found.curve if at <= three.bits) < three.cost
    assert found.chosen.cost == pytest.approx(sum(problem.costs[name][option] for name, option in plan.items()))
    assert two.label == "2 bits"


def test_costs_that_are_missing_or_blind_to_bits_give_no_curve() -> None:
    option, other = Option(2, 64), Option(4, 64)
    assert trade_off({}, {}, {}) is None
    assert trade_off({"a": {option: (8, 1.0), other: (16, 1.0)}}, {"a": option}, {"a": 4}) is None
    assert trade_off({"a": {option: (8, 1.0), other: (16, 0.5)}}, {"b": option}, {"b": 4}) is None


def test_an_audit_without_its_plans_is_left_out() -> None:
    assert audit_of({}) is None
    assert audit_of({"audit": {"spearman": 0.9, "slope": 1.0, "plans": 5}}) is None
