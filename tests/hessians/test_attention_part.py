"""Functions on tensors behind the Hessian of attention; ``test_attention.py`` holds the whole against Jacobians."""

import torch

from aptq.hessians.attention_part import random_signs, value_mixing


def test_the_mixing_of_effective_inputs_is_a_root_of_the_gram_matrix() -> None:
    weight = torch.randn(10, 24, dtype=torch.float64)  # 6 heads of 4, 2 value heads
    mixing = value_mixing(weight, 6, 2)
    heads = weight.unflatten(1, (6, 4))
    gram = torch.einsum("ohm,okm->hk", heads, heads)
    for group in range(2):
        mine = slice(3 * group, 3 * group + 3)
        assert torch.allclose(mixing[group] @ mixing[group].T, gram[mine, mine])


def test_signs_depend_on_their_key_alone() -> None:
    signs = random_signs((50, 40), (0, 1, 2, 0))
    assert torch.equal(signs, random_signs((50, 40), (0, 1, 2, 0)))
    assert not torch.equal(signs, random_signs((50, 40), (0, 1, 2, 1)))
    assert set(signs.unique().tolist()) == {-1, 1}
    assert abs(signs.double().mean().item()) < 0.1
