"""What the data of the contracts computes."""

import pytest
import torch

from aptq.api import Allocation, Curvature, Option


@pytest.mark.parametrize("width", [40, 512, 1100])
def test_quadratic_and_trace_against_the_dense_hessian(width: int) -> None:
    x = torch.randn(2, 3 * width, width)
    curvature = Curvature(column=x.transpose(1, 2) @ x, tokens=1)
    difference = torch.randn(6, width)
    dense = torch.block_diag(*(curvature.column[head] for head in (0, 0, 0, 1, 1, 1))).double()
    flat = difference.double().flatten()
    assert curvature.quadratic(difference) == pytest.approx((0.5 * flat @ dense @ flat).item(), rel=1e-4)
    assert curvature.trace(6) == pytest.approx(dense.trace().item(), rel=1e-6)


@pytest.mark.parametrize(("group_size", "groups"), [(64, 9), (128, 5), (-1, 1), (576, 1)])
def test_groups_round_up(group_size: int, groups: int) -> None:
    assert Option(4, group_size).num_groups(576) == groups


def test_blocks_are_told_by_the_first_number_of_a_name() -> None:
    names = ["h.10.attn", "h.2.attn", "h.2.experts.7.up", "h.10.up", "lm_head"]
    problem = Allocation(shapes=dict.fromkeys(names, (1, 1)), options=[], costs={}, storage_bits={})
    assert problem.blocks() == [["h.2.attn", "h.2.experts.7.up"], ["h.10.attn", "h.10.up"]]
