"""The paper's manual baseline."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aptq.allocators.blockwise import Blockwise, kept_blocks
from aptq.api import Allocation, AptqError, Option
from aptq.testing import check_allocator

LOW, HIGH = Option(2, 64), Option(4, 64)
KEEP = ("first", "last", "alternating")


def _problem(sizes: list[int], head: int = 0) -> Allocation:
    """Return blocks of two layers each: a tenth of the block's weights, and the rest."""
    shapes = {}
    for index, size in enumerate(sizes):
        shapes[f"model.layers.{index}.self_attn.q_proj"] = (size, 1)
        shapes[f"model.layers.{index}.mlp.up_proj"] = (size, 9)
    if head:
        shapes["lm_head"] = (head, 1)
    return Allocation(shapes=shapes, options=[LOW, HIGH], costs={}, storage_bits={})


def _kept(allocator: Blockwise, problem: Allocation) -> list[int]:
    """Return the blocks with high bits; all layers of a block must have the same."""
    plan = allocator.allocate(problem)
    assert list(plan) == list(problem.shapes)
    kept = []
    for index, names in enumerate(problem.blocks()):
        (bits,) = {plan[name].bits for name in names}
        kept += [index] if bits == 4 else []
    return kept


@pytest.mark.parametrize("keep", KEEP)
def test_keeps_the_contract(keep: str) -> None:
    check_allocator(Blockwise(ratio=0.5, keep=keep), average_bits=3.0)
    assert not Blockwise(keep=keep).needs_costs


@pytest.mark.parametrize(
    ("keep", "ratio", "kept"),
    [
        ("first", 0.5, [0, 1, 2, 3]),
        ("last", 0.5, [4, 5, 6, 7]),
        ("alternating", 0.5, [1, 3, 5, 7]),
        ("alternating", 0.75, [0, 2, 3, 4, 6, 7]),
        ("alternating", 0.25, [2, 6]),
        ("first", 0.74, [0, 1, 2, 3, 4]),  # five eighths: six would be more than the share
        ("last", 0.0, []),
        ("alternating", 1.0, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_the_high_bits_go_to_whole_blocks(keep: str, ratio: float, kept: list[int]) -> None:
    assert _kept(Blockwise(ratio=ratio, keep=keep), _problem([10] * 8)) == kept


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=30),
    head=st.integers(0, 3000),
    ratio=st.floats(0, 1),
    keep=st.sampled_from(KEEP),
)
def test_never_exceeds_the_share_of_the_weights(sizes: list[int], head: int, ratio: float, keep: str) -> None:
    problem = _problem(sizes, head)
    plan = Blockwise(ratio=ratio, keep=keep).allocate(problem)
    high = sum(problem.num_weights(name) for name, option in plan.items() if option == HIGH)
    assert high <= ratio * problem.total_weights * (1 + 1e-6)
    assert _kept(Blockwise(ratio=1.0, keep=keep), problem) == list(range(len(sizes)))


@settings(max_examples=100, deadline=None)
@given(depth=st.integers(1, 100), share=st.floats(0, 1))
def test_alternating_blocks_are_spread_as_evenly_as_can_be(depth: int, share: float) -> None:
    count = round(share * depth)
    kept = kept_blocks(count, depth, "alternating")
    distances = [after - before for before, after in zip(kept, kept[1:], strict=False)]
    assert len(kept) == count
    assert all(0 <= index < depth for index in kept)
    assert not distances or (min(distances) >= 1 and max(distances) - min(distances) <= 1)
    assert not kept or abs(kept[0] - (depth - 1 - kept[-1])) <= 1


@pytest.mark.parametrize(("ratio", "bits"), [(0.5, 2), (0.9, 2), (1.0, 4)])
def test_a_head_comes_after_the_blocks(ratio: float, bits: int) -> None:
    problem = _problem([10] * 4, head=100)  # a fifth of the weights
    plan = Blockwise(ratio=ratio).allocate(problem)
    assert plan["lm_head"].bits == bits


def test_a_head_gets_what_the_blocks_leave() -> None:
    problem = _problem([10] * 4, head=50)  # 450 weights: half of them is two blocks and a rest of 25
    assert Blockwise(ratio=0.5).allocate(problem)["lm_head"] == LOW
    assert _kept(Blockwise(ratio=0.6), problem) == [0, 1]
    assert Blockwise(ratio=0.6).allocate(problem)["lm_head"] == HIGH


@pytest.mark.parametrize("options", [{"ratio": 1.5}, {"low": 4, "high": 4}, {"keep": "middle"}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(AptqError, match="allocator"):
        Blockwise(**options)  # type: ignore[arg-type]
