"""Tokens one by one, groups all at once."""

import pytest
import torch

from aptq.activations.tokens import check_groups, joined, split, token_scale
from aptq.api import AptqError


def test_splitting_and_joining_leave_what_was_there() -> None:
    x = torch.randn(2, 3, 37, dtype=torch.bfloat16)
    groups = split(x, 16)
    assert groups.shape == (2, 3, 3, 16)
    assert groups.dtype == torch.float32
    assert not groups[..., 2, 5:].any()
    assert torch.equal(joined(groups, x), x)


def test_each_token_has_a_unit_of_its_own() -> None:
    largest = torch.tensor([[1.0, 2.0, 0.1], [1000.0, 3000.0, 0.0]])
    both = token_scale(largest, 31.0, "e4m3")
    for token in range(2):
        assert torch.equal(both[token], token_scale(largest[token], 31.0, "e4m3"))
    assert both.amax(1).tolist() == pytest.approx([2.0 / 31, 3000.0 / 31], rel=1e-6)


def test_gradients_pass_straight_through() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    y = joined(split(x, 4).round(), x)
    assert torch.allclose(y, x.round())
    (y * torch.arange(8.0)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.arange(8.0).expand(4, -1))


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(AptqError, match=r"activation\.group_size=0"):
        check_groups(0, "e4m3")
    with pytest.raises(AptqError, match="use one of float16, bfloat16, float32, e4m3, e8m0"):
        check_groups(32, "e5m2")
