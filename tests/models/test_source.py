"""A streamed model is the model that ``from_pretrained`` gives, one block at a time."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from aptq.api import BlockInputs
from aptq.models import ModelSource, open_model, unfuse_experts
from aptq.settings import ModelSettings

Make = Callable[..., Path]
FAMILIES = [
    "llama",
    "llama_untied",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "phi",
    "opt",
    "gpt2",
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
]


def _open(folder: Path, **options: Any) -> ModelSource:
    return open_model(ModelSettings(path=str(folder), **options))


def _reference(folder: Path, family: str = "") -> PreTrainedModel:
    attention = "eager" if family == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation=attention).eval()
    unfuse_experts(model)
    return model


def _watch_blocks(model: PreTrainedModel, names: tuple[str, ...], tokens: Tensor) -> list[tuple[BlockInputs, Tensor]]:
    """Run a model and return what went into each block and what came out."""
    seen: list[tuple[BlockInputs, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append((BlockInputs(hidden=args[0], args=args[1:], kwargs=kwargs), hidden))

    handles = [model.get_submodule(name).register_forward_hook(keep, with_kwargs=True) for name in names]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_blocks_equal_the_whole_model(family: str, tiny_model_folder: Make) -> None:
    folder = tiny_model_folder(family)
    source = _open(folder)
    assert source.streamed
    assert source.resident_reason is None
    reference = _reference(folder, family)
    state = reference.state_dict()
    tokens = torch.randint(4, 260, (2, 48), generator=torch.Generator().manual_seed(0))
    runs = _watch_blocks(reference, source.block_names, tokens)

    for index, (inputs, expected) in enumerate(runs):
        module = source.model.get_submodule(source.block_names[index])
        assert all(parameter.is_meta for parameter in module.parameters())
        block = source.load_block(index, "cpu")
        assert block.module is module
        assert (block.index, block.name) == (index, source.block_names[index])
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[f"{block.name}.{name}"]), name
            assert tensor.dtype == state[f"{block.name}.{name}"].dtype
        with torch.no_grad():
            assert torch.equal(inputs.run(module), expected)
        source.release_block(index)
        assert all(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_other_tensors_and_layers_are_the_whole_state_dict(family: str, tiny_model_folder: Make) -> None:
    folder = tiny_model_folder(family)
    source = _open(folder)
    reference = _reference(folder, family)
    expected = reference.state_dict()
    for name in reference.all_tied_weights_keys:
        del expected[name]
    found = dict(source.other_tensors())
    assert all(
        parameter.is_meta for name in source.block_names for parameter in source.model.get_submodule(name).parameters()
    )
    for index in range(len(source.block_names)):
        for name, layer in source.load_block(index, "cpu").layers.items():
            assert f"{name}.weight" not in found
            found[f"{name}.weight"] = reference.get_submodule(name).weight if "gpt2" in family else layer.weight()
        source.release_block(index)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert source.num_bytes == sum(parameter.nbytes for parameter in reference.parameters())


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_outside_of_the_blocks_is_real(family: str, tiny_model_folder: Make) -> None:
    folder = tiny_model_folder(family)
    source = _open(folder)
    prefixes = tuple(f"{name}." for name in source.block_names)
    expected = _reference(folder)
    for name, parameter in source.model.named_parameters(remove_duplicate=False):
        if not name.startswith(prefixes):
            assert torch.equal(parameter, expected.get_parameter(name))
        assert not parameter.requires_grad
    for (name, buffer), (_, other) in zip(source.model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert not source.model.training
    tied = source.model.get_input_embeddings().weight is source.model.get_output_embeddings().weight
    assert tied == (family != "mixtral")


def test_loading_all_blocks_gives_the_same_logits(tiny_model_folder: Make) -> None:
    folder = tiny_model_folder("qwen2_moe")
    source = _open(folder)
    for index in range(3):
        source.load_block(index, "cpu")
    tokens = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(source.model(tokens).logits, _reference(folder)(tokens).logits)


def test_what_is_written_to_a_block_is_gone_when_it_is_loaded_again(tiny_model_folder: Make) -> None:
    source = _open(tiny_model_folder("llama"))
    name, layer = next(iter(source.load_block(0, "cpu").layers.items()))
    original = layer.weight().clone()
    layer.set_weight(torch.zeros_like(original))
    source.release_block(0)
    assert torch.equal(source.load_block(0, "cpu").layers[name].weight(), original)


def test_full_model_shares_nothing_with_the_skeleton(tiny_model_folder: Make) -> None:
    folder = tiny_model_folder("mixtral")
    source = _open(folder)
    full = source.load_full()
    assert not any(parameter.is_meta for parameter in full.parameters())
    with torch.no_grad():
        source.model.get_input_embeddings().weight.zero_()
    tokens = torch.arange(4, 40)[None]
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(full(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        ("float32", "auto", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("float32", "float16", torch.float16),
    ],
)
def test_dtype(stored: str, asked: str, expected: torch.dtype, tiny_model_folder: Make) -> None:
    source = _open(tiny_model_folder("llama", dtype=stored), dtype=asked)
    assert source.dtype == expected
    full = source.load_full()
    assert full.dtype == expected
    assert source.num_bytes == sum(parameter.nbytes for parameter in full.parameters())
    block = source.load_block(1, "cpu")
    for name, tensor in block.module.state_dict().items():
        assert torch.equal(tensor, full.state_dict()[f"{block.name}.{name}"])
    assert {tensor.dtype for _, tensor in source.other_tensors()} == {expected}


def test_fingerprint_tells_models_apart(tiny_model_folder: Make, tmp_path: Path) -> None:
    folder = tiny_model_folder("llama")
    first = _open(folder).fingerprint()
    assert first == _open(folder).fingerprint()
    assert first != _open(folder, dtype="bfloat16").fingerprint()
    changed = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        changed.model.layers[2].mlp.down_proj.weight[0, 0] += 1e-3
    changed.save_pretrained(tmp_path)
    _open(folder).tokenizer.save_pretrained(tmp_path)
    assert first != _open(tmp_path).fingerprint()


def test_generation_config_and_tokenizer(tiny_model_folder: Make) -> None:
    source = _open(tiny_model_folder("llama"))
    assert source.generation_config is not None
    assert source.generation_config.eos_token_id == 2
    ids = source.tokenizer("Grüße").input_ids
    assert len(ids) == len("Grüße".encode())
    assert source.tokenizer.decode(ids) == "Grüße"
    assert source.config.model_type == "llama"


def _live_bytes() -> int:
    """Return how many bytes all tensors of the process hold, shared ones counted once.

    Compiled graphs of other tests leave tensors without data behind.
    """
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor) and type(item) is not FakeTensor]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


_RESIDENT = """
import sys, psutil
from aptq.models import open_model
from aptq.settings import ModelSettings
source = open_model(ModelSettings(path=sys.argv[1]))
for index in range(len(source.block_names)):
    source.load_block(index, "cpu")
    print(psutil.Process().memory_info().rss)
    source.release_block(index)
"""


def test_memory_does_not_grow_with_the_number_of_blocks(tiny_model_folder: Make, tmp_path: Path) -> None:
    blocks, width = 24, 256
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        max_position_embeddings=64,
        dtype="float32",
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    _open(tiny_model_folder("llama")).tokenizer.save_pretrained(tmp_path)
    block_bytes = 4 * (4 * width**2 + 3 * 4 * width**2)
    before = _live_bytes()
    source = _open(tmp_path)
    outside = source.num_bytes - blocks * block_bytes
    for index in range(blocks):
        source.load_block(index, "cpu")
        if index < blocks - 1:
            source.release_block(index)
    assert _live_bytes() - before < outside + 1.5 * block_bytes
    # Mapped pages of the file would show here, though no tensor holds them; in a process with no other history.
    done = subprocess.run([sys.executable, "-c", _RESIDENT, str(tmp_path)], capture_output=True, text=True, check=True)
    resident = [int(line) for line in done.stdout.split()]
    assert max(resident) - resident[0] < 4 * block_bytes
