"""What the layers of an attention module are found to be; ``test_attention.py`` has the families of transformers."""

import pytest
import torch
from torch import Tensor, nn

from aptq.api import AptqError
from aptq.hessians.attention_roles import Roles, all_alike, find_roles
from aptq.hessians.module_run import Watched, run_module
from aptq.models.structure import find_layers
from aptq.testing.models import TinyAttention


def _watched(module: nn.Module) -> Watched:
    layers = find_layers(module, "attention")
    output = layers.pop("attention.o_proj")
    return Watched("attention", module.requires_grad_(False), layers, output, TinyAttention.head_dim)


def _roles(module: nn.Module, exact_values: bool = True) -> Roles:
    torch.manual_seed(0)
    watched = _watched(module)
    return find_roles(watched, run_module(watched, ((torch.randn(2, 5, 24),), {})), exact_values)


def test_queries_keys_and_values_are_told_apart() -> None:
    roles = _roles(TinyAttention(24))
    assert roles.local == {"attention.q_proj": [0, 1, 2]}
    assert roles.values == {"attention.v_proj": [0]}
    assert roles.others == {"attention.q_proj": [], "attention.k_proj": [0], "attention.v_proj": []}


def test_values_are_left_to_chance_where_that_is_asked_for() -> None:
    roles = _roles(TinyAttention(24), exact_values=False)
    assert roles.values == {}
    assert roles.others["attention.v_proj"] == [0]


class _Scaled(TinyAttention):
    """Does something behind its output layer, of which the closed form of the values knows nothing."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * 2.0


class _Gated(TinyAttention):
    """Its output layer is fed with something else than attended values."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.v_proj = nn.Sequential(self.v_proj, nn.Tanh())


@pytest.mark.parametrize("kind", [_Scaled, _Gated])
def test_a_closed_form_that_does_not_hold_is_not_used(kind: type[TinyAttention]) -> None:
    roles = _roles(kind(24))
    assert roles.values == {}
    assert sorted(name for name, heads in roles.others.items() if heads)[0] == "attention.k_proj"
    assert roles.local == {"attention.q_proj": [0, 1, 2]}


class _Later(TinyAttention):
    """Sees later tokens."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.flip(1)).flip(1)


def test_outputs_that_depend_on_later_tokens_are_refused() -> None:
    with pytest.raises(AptqError, match="causal mask is missing"):
        _roles(_Later(24))


def test_all_alike_has_every_head_measured_by_whole_gradients() -> None:
    roles = all_alike(_watched(TinyAttention(24)))
    heads = {name: list(each) for name, each in roles.others.items()}
    assert heads == {"attention.q_proj": [0, 1, 2], "attention.k_proj": [0], "attention.v_proj": [0]}
    assert not roles.local
    assert not roles.values
