"""The walk block by block is the model's own forward pass, whatever the family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor
from transformers import AutoModelForCausalLM

from aptq.api import AptqError
from aptq.calibration.walk import Walk
from aptq.models import open_model
from aptq.settings import ModelSettings

FAMILIES = (
    *("llama", "llama_untied", "qwen2", "qwen3", "mistral", "gemma2", "phi", "opt", "gpt2"),
    *("mixtral", "qwen3_moe", "qwen2_moe"),
)


def make_walk(folder: Path, samples: Tensor, batch_size: int = 2) -> Walk:
    return Walk(open_model(ModelSettings(path=str(folder))), samples, batch_size, Fabric(accelerator="cpu", devices=1))


def tokens(num: int = 3, length: int = 48) -> Tensor:
    return torch.randint(4, 260, (num, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_ends_on_the_logits_of_the_whole_model(family: str, tiny_model_folder: Callable[..., Path]) -> None:
    folder, samples = tiny_model_folder(family), tokens()
    walk = make_walk(folder, samples)
    for step in walk.steps():
        step.run()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=walk.source.config._attn_implementation)
    with torch.no_grad():
        expected = model(input_ids=samples[:2]).logits
    logits = walk.logits()
    assert torch.allclose(logits, expected[:1, -logits.shape[1] :], atol=1e-4)


def test_every_sample_is_walked_once_and_in_order(tiny_model_folder: Callable[..., Path]) -> None:
    walk = make_walk(tiny_model_folder(), tokens(5), batch_size=2)
    seen = []
    for step in walk.steps():
        step.run()
        seen.append([tuple(batch.hidden.shape[:2]) for batch in step.inputs])
        assert step.tokens == 5 * 48
    assert seen == [[(2, 48), (2, 48), (1, 48)]] * 3


def test_blocks_leave_the_device_and_get_their_forward_back(tiny_model_folder: Callable[..., Path]) -> None:
    walk = make_walk(tiny_model_folder(), tokens())
    for step in walk.steps():
        loaded = [name for name in walk.source.block_names if not _is_meta(walk, name)]
        assert loaded == [step.block.name]
        step.run()
    assert all(_is_meta(walk, name) for name in walk.source.block_names)
    assert all("forward" not in vars(walk.source.model.get_submodule(name)) for name in walk.source.block_names)


def _is_meta(walk: Walk, name: str) -> bool:
    return next(walk.source.model.get_submodule(name).parameters()).is_meta


def test_activations_that_are_not_finite_name_the_block(tiny_model_folder: Callable[..., Path]) -> None:
    walk = make_walk(tiny_model_folder(), tokens())

    def go() -> None:
        for step in walk.steps():
            if step.block.index == 1:
                next(iter(step.block.layers.values())).weight().fill_(float("nan"))
            step.run()

    with pytest.raises(AptqError, match=r"block model\.layers\.1 hold NaN or Inf"):
        go()


def test_full_precision_activations_travel_beside_those_of_changed_blocks(
    tiny_model_folder: Callable[..., Path],
) -> None:
    folder, samples = tiny_model_folder(), tokens()
    original, changed = make_walk(folder, samples), make_walk(folder, samples)
    for plain, step in zip(original.steps(), changed.steps(full_precision=True), strict=True):
        assert plain.full_precision is None
        assert step.full_precision is not None
        given = [batch.hidden for batch in step.full_precision.inputs]
        assert all(torch.equal(a, batch.hidden) for a, batch in zip(given, plain.inputs, strict=True))
        same = all(torch.equal(a, batch.hidden) for a, batch in zip(given, step.inputs, strict=True))
        assert same == (step.block.index == 0)
        plain.run()
        step.full_precision.run()
        for layer in step.block.layers.values():
            layer.set_weight(1.1 * layer.weight())
        step.run()
