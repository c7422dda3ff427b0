"""Experts taken apart compute what the fused ones do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig

from aptq.models import UnfusedExperts, unfuse_experts

FAMILIES = ["mixtral", "qwen3_moe", "qwen2_moe"]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(4, 260, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_unfused_model_gives_the_same_logits(
    family: str, tiny_model_folder: Callable[..., Path], tokens: torch.Tensor
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(family)).eval()
    with torch.no_grad():
        expected = model(tokens).logits
        assert unfuse_experts(model) == 3
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_matrices_are_views_with_names_of_their_own(tiny_model_folder: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("qwen3_moe"))
    fused = model.model.layers[1].mlp.experts
    gate_up, down = fused.gate_up_proj, fused.down_proj
    unfuse_experts(model)
    expert = model.get_submodule("model.layers.1.mlp.experts.3")
    assert isinstance(expert.gate_up_proj, nn.Linear)
    assert expert.gate_up_proj.weight.data_ptr() == gate_up[3].data_ptr()
    assert torch.equal(expert.down_proj.weight, down[3])
    assert not expert.down_proj.weight.requires_grad
    names = set(model.state_dict())
    assert "model.layers.1.mlp.experts.3.gate_up_proj.weight" in names
    assert "model.layers.1.mlp.experts.gate_up_proj" not in names


def test_works_on_meta_and_only_once(tiny_model_folder: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("mixtral")).to("meta")
    assert unfuse_experts(model) == 3
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, UnfusedExperts)
    assert len(experts) == 4
    assert experts[0].gate_up_proj.weight.is_meta
    assert unfuse_experts(model) == 0


def test_expert_that_no_token_reaches_and_foreign_tokens(tiny_model_folder: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("mixtral"))
    unfuse_experts(model)
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    index = torch.full((5, 2), 2)
    index[:, 1] = 4  # one past the last: a token that another rank serves
    with torch.no_grad():
        result = experts(hidden, index, torch.full((5, 2), 0.5))
        torch.testing.assert_close(result, 0.5 * experts[2](hidden))


def test_other_layouts_stay_fused_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=4,
    )
    model = AutoModelForCausalLM.from_config(config)
    experts = model.model.layers[0].mlp.experts
    with caplog.at_level(logging.WARNING):
        assert unfuse_experts(model) == 0
    assert model.model.layers[0].mlp.experts is experts
    assert "model.layers.0.mlp.experts: transposed weights" in caplog.text
