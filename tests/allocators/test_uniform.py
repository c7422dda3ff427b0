"""The same bits everywhere."""

from aptq.allocators.uniform import Uniform
from aptq.testing import check_allocator


def test_keeps_the_contract() -> None:
    check_allocator(Uniform(bits=3), average_bits=3.0)
    assert not Uniform().needs_costs
