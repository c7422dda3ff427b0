"""The curvature of a table that a head is tied to, against the model's own hidden states and autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor
from transformers import AutoModelForCausalLM

from aptq.calibration.head_curvature import head_curvature
from aptq.calibration.walk import Walk
from aptq.models import open_model
from aptq.settings import ModelSettings

FABRIC = Fabric(accelerator="cpu", devices=1)
SAMPLES = torch.randint(4, 260, (3, 32), generator=torch.Generator().manual_seed(0))


def _walk(folder: Path, **settings: Any) -> Walk:
    return Walk(open_model(ModelSettings(path=str(folder), quantize_embeddings=4, **settings)), SAMPLES, 2, FABRIC)


def _states(folder: Path) -> Tensor:
    """Return what the head is called with, in float64 ``[tokens, hidden]``."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    caught: list[Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda head, args: caught.append(args[0]))
    with torch.no_grad():
        model(SAMPLES)
    return caught[0].double().flatten(0, 1)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_it_is_the_heads_with_a_share_for_lookups(family: str, tiny_model_folder: Callable[..., Path]) -> None:
    folder = tiny_model_folder(family)
    walk, seen = _walk(folder), []
    found = head_curvature(walk, lambda done, name: seen.append((done, name)))
    assert found is not None
    states = _states(folder)
    gram = 2 * states.T @ states / len(states)
    expected = gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    torch.testing.assert_close(found.column[0].double(), expected, rtol=1e-4, atol=1e-4 * float(gram.diagonal().mean()))
    assert found.tokens == SAMPLES.numel()
    assert seen == list(enumerate(walk.source.block_names))
    assert not walk.last_hidden, "nothing of the pass is kept"


def test_it_is_the_hessian_of_squared_logit_errors(tiny_model_folder: Callable[..., Path]) -> None:
    folder = tiny_model_folder("llama")
    found, states = head_curvature(_walk(folder)), _states(folder)
    assert found is not None

    def loss(error: Tensor) -> Tensor:
        return (states @ error).square().mean()

    hessian = torch.autograd.functional.hessian(loss, torch.zeros(64, dtype=torch.float64))
    share = 0.1 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)  # type: ignore[union-attr]
    torch.testing.assert_close(found.column[0].double(), hessian + share, rtol=1e-4, atol=1e-3)


def test_there_is_none_without_a_head_that_is_tied_and_stays_so(tiny_model_folder: Callable[..., Path]) -> None:
    assert head_curvature(_walk(tiny_model_folder("llama_untied"))) is None
    assert head_curvature(_walk(tiny_model_folder("llama"), quantize_head=True)) is None
