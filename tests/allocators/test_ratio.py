"""The paper's ranking allocator."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aptq.allocators.ratio import Ratio
from aptq.api import Allocation, AptqError, Option
from aptq.testing import check_allocator

LOW, HIGH = Option(2, 64), Option(4, 64)


def _problem(sizes: list[int], costs: list[tuple[float, float]]) -> Allocation:
    names = [f"layer{i}" for i in range(len(sizes))]
    return Allocation(
        shapes={name: (size, 1) for name, size in zip(names, sizes, strict=True)},
        options=[LOW, HIGH],
        costs={name: {LOW: low, HIGH: high} for name, (low, high) in zip(names, costs, strict=True)},
        storage_bits={name: {LOW: 2 * size, HIGH: 4 * size} for name, size in zip(names, sizes, strict=True)},
    )


def test_keeps_the_contract() -> None:
    check_allocator(Ratio(ratio=0.5), average_bits=3.0)


def test_the_top_share_of_weights_gets_the_high_bits() -> None:
    problem = _problem([10, 10, 10, 10], [(1.0, 1.0), (4.0, 4.0), (3.0, 3.0), (2.0, 2.0)])  # blind to bits
    plan = Ratio(ratio=0.75).allocate(problem)
    assert [plan[name].bits for name in problem.shapes] == [2, 4, 4, 4]


def test_shares_count_weights_not_layers() -> None:
    problem = _problem([90, 5, 5], [(9.0, 9.0), (8.0, 8.0), (7.0, 7.0)])
    plan = Ratio(ratio=0.1).allocate(problem)
    assert [plan[name].bits for name in problem.shapes] == [2, 4, 4], "the large layer does not fit into a tenth"


def test_costs_that_know_bits_rank_by_what_high_bits_save_per_weight() -> None:
    problem = _problem([100, 10], [(10.0, 2.0), (3.0, 1.0)])  # saves 8 on 100 weights, 2 on 10
    plan = Ratio(ratio=0.95).allocate(problem)
    assert plan["layer1"] == HIGH


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=30),
    ratio=st.floats(0, 1),
    seed=st.randoms(use_true_random=False),
)
def test_never_exceeds_the_share(sizes: list[int], ratio: float, seed) -> None:  # type: ignore[no-untyped-def]
    costs = [(seed.random(), 0.0) for _ in sizes]
    problem = _problem(sizes, costs)
    plan = Ratio(ratio=ratio).allocate(problem)
    high = sum(problem.num_weights(name) for name, option in plan.items() if option == HIGH)
    assert high <= ratio * problem.total_weights * (1 + 1e-6)
    assert list(plan) == list(problem.shapes)


def test_more_budget_never_takes_bits_from_equal_layers() -> None:
    problem = _problem([7] * 12, [(float(i), 0.0) for i in range(12)])
    counts = [sum(o == HIGH for o in Ratio(ratio=r / 12).allocate(problem).values()) for r in range(13)]
    assert counts == list(range(13))


@pytest.mark.parametrize("options", [{"ratio": 1.5}, {"ratio": -0.1}, {"low": 4, "high": 4}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(AptqError, match="allocator"):
        Ratio(**options)  # type: ignore[arg-type]


def test_nothing_has_to_be_measured_at_the_ends() -> None:
    assert not Ratio(ratio=0.0).needs_costs
    assert not Ratio(ratio=1.0).needs_costs
