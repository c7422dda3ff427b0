"""Functions on tensors behind the closed form of values; ``test_attention.py`` holds the whole against Jacobians."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from aptq.hessians.attended import attend, attention_gram, value_mixing
from aptq.hessians.module_run import DotProduct


def test_the_mixing_of_effective_inputs_is_a_root_of_the_gram_matrix() -> None:
    weight = torch.randn(10, 24, dtype=torch.float64)  # 6 heads of 4, 2 value heads
    mixing = value_mixing(weight, 6, 2)
    heads = weight.unflatten(1, (6, 4))
    gram = torch.einsum("ohm,okm->hk", heads, heads)
    for group in range(2):
        mine = slice(3 * group, 3 * group + 3)
        assert torch.allclose(mixing[group] @ mixing[group].T, gram[mine, mine])


@pytest.mark.parametrize("masked", ["causal", "bool", "bool by head", "added", "no"])
def test_attends_as_torch_does(masked: str) -> None:
    """300 tokens: several chunks of queries, the last one shorter."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, 300, 8).double(), torch.randn(2, 3, 300, 8).double()
    x = torch.randn(2, 300, 8).double()
    allowed = torch.rand(2, 6 if "head" in masked else 1, 300, 300) < 0.5
    allowed |= torch.eye(300, dtype=torch.bool)
    added = torch.randn(300, 300).double()
    mask = allowed if "bool" in masked else added if masked == "added" else None
    expected = scaled_dot_product_attention(
        query,
        key.repeat_interleave(2, dim=1),
        x[:, None].expand(-1, 6, -1, -1),
        attn_mask=mask,
        is_causal=masked == "causal",
        scale=0.7,
    )
    call = DotProduct(query, key, mask, masked == "causal", 0.7)
    for group in range(3):
        heads = slice(2 * group, 2 * group + 2)
        assert torch.allclose(attend(call, heads, x), expected[:, heads], atol=1e-12)
        root, weights = torch.randn(2, 2).double(), torch.rand(2, 300).double()
        effective = torch.einsum("bhti,hk,bt->bkti", expected[:, heads], root, weights.sqrt())
        gram = attention_gram(call, heads, root, weights)
        assert torch.allclose(x.mT @ gram @ x, torch.einsum("bkti,bktj->bij", effective, effective), atol=1e-9)
