"""Functions on tensors behind the Hessian of attention; ``test_attention.py`` holds the whole against Jacobians."""

import torch

from aptq.hessians.attention_part import random_signs


def test_signs_depend_on_their_key_alone() -> None:
    signs = random_signs((50, 40), (0, 1, 2, 0))
    assert torch.equal(signs, random_signs((50, 40), (0, 1, 2, 0)))
    assert not torch.equal(signs, random_signs((50, 40), (0, 1, 2, 1)))
    assert set(signs.unique().tolist()) == {-1, 1}
    assert abs(signs.double().mean().item()) < 0.1
