"""One module run on the side: what is seen of it, and that nothing stays behind."""

import torch
from torch import Tensor

from aptq.hessians.module_run import Watched, replaced_forward, run_module
from aptq.models.structure import find_layers
from aptq.testing.models import TinyAttention


def _watched() -> tuple[TinyAttention, Watched]:
    torch.manual_seed(0)
    module = TinyAttention(24).requires_grad_(False)
    layers = find_layers(module, "attention")
    output = layers.pop("attention.o_proj")
    return module, Watched("attention", module, layers, output, module.head_dim)


def test_sees_layers_attention_and_output() -> None:
    module, watched = _watched()
    x = torch.randn(2, 5, 24)
    run = run_module(watched, ((x,), {}))
    assert torch.equal(run.output, module(x))
    assert run.ends_with_output_layer
    assert list(run.seen) == ["attention.q_proj", "attention.k_proj", "attention.v_proj"]
    assert all(torch.equal(seen.input, x) for seen in run.seen.values())
    (call,) = run.attentions
    assert call.causal
    assert call.query.shape == call.key.shape == (2, 3, 5, 8)
    assert run.mixed is not None
    assert torch.allclose(module.o_proj(run.mixed), run.output)


def test_the_output_can_be_differentiated_by_what_layers_give() -> None:
    _, watched = _watched()
    run = run_module(watched, ((torch.randn(1, 4, 24),), {}))
    (gradient,) = torch.autograd.grad(run.output.sum(), [run.seen["attention.k_proj"].output])
    assert gradient.shape == (1, 4, 8)
    assert gradient.any()


def test_heads_are_blocks_of_rows() -> None:
    _, watched = _watched()
    assert [watched.heads(name) for name in watched.layers] == [3, 1, 1]
    assert watched.split("attention.q_proj", torch.zeros(2, 5, 24)).shape == (2, 5, 3, 8)


def test_nothing_stays_behind() -> None:
    module, watched = _watched()
    run_module(watched, ((torch.randn(1, 4, 24),), {}))
    assert not any(child._forward_hooks for child in module.modules())
    x = torch.randn(1, 4, 24)
    before = module.q_proj(x)

    def zeros(x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    with replaced_forward(module.q_proj, zeros):
        assert not module.q_proj(x).any()
    assert torch.equal(module.q_proj(x), before)
