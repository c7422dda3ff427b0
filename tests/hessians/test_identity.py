"""No curvature."""

import torch

from aptq.hessians.identity import Identity
from aptq.testing import check_hessian
from aptq.testing.models import tiny_block, tiny_inputs


def test_keeps_the_contract() -> None:
    check_hessian(Identity())


def test_is_twice_the_unit_matrix_per_token() -> None:
    block, inputs = tiny_block(), tiny_inputs()
    with torch.no_grad(), Identity().observe(block) as observer:
        observer(inputs)
    for name, total in observer.sums().items():
        width = block.layers[name].shape[1]
        assert torch.equal(total.column[0] / total.tokens, 2 * torch.eye(width))
