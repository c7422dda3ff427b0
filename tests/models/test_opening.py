"""Checkpoints whose names or layout differ from the model's, and those that are loaded as a whole."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from aptq.api import AptqError
from aptq.models import ModelSource, open_model, unfuse_experts
from aptq.settings import ModelSettings

Make = Callable[..., Path]


def _rewrite(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Copy a model folder with other tensors in it."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


def _check(source: ModelSource, expected: PreTrainedModel) -> None:
    """Compare every block, and what lies outside, with a model loaded as a whole."""
    unfuse_experts(expected)
    state = expected.state_dict()
    for name, tensor in source.other_tensors():
        assert torch.equal(tensor, state[name]), name
    for index in range(len(source.block_names)):
        block = source.load_block(index, "cpu")
        for name, tensor in block.module.state_dict().items():
            assert torch.equal(tensor, state[f"{block.name}.{name}"]), name
        source.release_block(index)


@pytest.mark.parametrize(("family", "prefix"), [("llama", "model."), ("gpt2", "transformer.")])
def test_prefix_of_the_base_model_may_be_absent(
    family: str, prefix: str, tiny_model_folder: Make, tmp_path: Path
) -> None:
    folder = tiny_model_folder(family)
    bare = _rewrite(folder, tmp_path, lambda all: {name.removeprefix(prefix): all[name] for name in all})
    source = open_model(ModelSettings(path=str(bare)))
    assert source.streamed
    _check(source, AutoModelForCausalLM.from_pretrained(folder))


def test_tensors_that_the_model_does_not_know_are_ignored(tiny_model_folder: Make, tmp_path: Path) -> None:
    folder = tiny_model_folder("gpt2")
    extra = {"transformer.h.0.attn.bias": torch.ones(1, 1, 256, 256), "transformer.h.0.attn.masked_bias": torch.ones(1)}
    source = open_model(ModelSettings(path=str(_rewrite(folder, tmp_path, lambda all: all | extra))))
    assert source.streamed
    _check(source, AutoModelForCausalLM.from_pretrained(folder))


def test_tied_model_of_which_only_the_head_is_stored(tiny_model_folder: Make, tmp_path: Path) -> None:
    folder = tiny_model_folder("llama")

    def only_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        return tensors

    source = open_model(ModelSettings(path=str(_rewrite(folder, tmp_path, only_head))))
    assert source.streamed
    names = [name for name, _ in source.other_tensors()]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    _check(source, AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("differ", [False, True])
def test_tied_model_with_both_tensors_stored(
    differ: bool, tiny_model_folder: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_model_folder("llama")

    def both(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + float(differ)}

    path = _rewrite(folder, tmp_path, both)
    with caplog.at_level(logging.WARNING):
        source = open_model(ModelSettings(path=str(path)))
    assert ("lm_head.weight" in dict(source.other_tensors())) == differ
    assert ("they are not tied" in caplog.text) == differ
    expected = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(source.model.lm_head.weight, expected.lm_head.weight)
    assert source.num_bytes == sum(parameter.nbytes for parameter in expected.parameters())


@pytest.mark.parametrize("family", ["llama_untied", "mixtral"])
def test_sharded(family: str, tiny_model_folder: Make, tmp_path: Path) -> None:
    folder = tiny_model_folder(family)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    source = open_model(ModelSettings(path=str(tmp_path)))
    assert source.streamed
    _check(source, model)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_stored_fused(family: str, tiny_model_folder: Make, tmp_path: Path) -> None:
    folder = tiny_model_folder(family)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    source = open_model(ModelSettings(path=str(tmp_path)))
    assert source.streamed
    _check(source, model)


def _missing_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".experts.2.up_proj" not in name}


def _missing_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "model.layers.1.input_layernorm.weight"}


def _missing_embedding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "model.embed_tokens.weight"}


def _wrong_shape(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"model.layers.0.mlp.gate_proj.weight": torch.zeros(95, 64)}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", _missing_norm, r"lacks 1 tensors.*model.layers.1.input_layernorm.weight"),
        ("llama", _missing_embedding, r"lacks 1 tensors.*model.embed_tokens.weight"),
        ("llama", _wrong_shape, "cannot load this model"),
        ("qwen3_moe", _missing_expert, "cannot load this model|lacks"),
    ],
)
def test_checkpoints_that_do_not_fit_the_config(
    family: str,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
    tiny_model_folder: Make,
    tmp_path: Path,
) -> None:
    path = _rewrite(tiny_model_folder(family), tmp_path, change)
    with pytest.raises(AptqError, match=message):
        open_model(ModelSettings(path=str(path)))


def _check_resident(source: ModelSource) -> None:
    """A resident model gives its blocks unchanged too, whatever was written to them."""
    assert not source.streamed
    expected = source.load_full()
    name, layer = next(iter(source.load_block(0, "cpu").layers.items()))
    layer.set_weight(torch.zeros(layer.shape))
    source.release_block(0)
    assert not any(parameter.is_meta for parameter in source.model.parameters())
    assert torch.equal(source.model.get_submodule(name).weight, expected.get_submodule(name).weight)
    _check(source, expected)


def _write_pickle(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    (target / "model.safetensors").unlink()
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), target / "pytorch_model.bin")
    return target


def test_pickle_only_when_asked(tiny_model_folder: Make, tmp_path: Path) -> None:
    path = _write_pickle(tiny_model_folder("qwen2"), tmp_path)
    with pytest.raises(AptqError, match=r"pickled weights \(pytorch_model.bin\).*model.allow_pickle=true"):
        open_model(ModelSettings(path=str(path)))
    source = open_model(ModelSettings(path=str(path), allow_pickle=True))
    assert source.resident_reason == "a pickle can only be read as a whole"
    _check_resident(source)


class _Payload:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return open, ("owned", "w")


def test_pickle_is_never_executed(tiny_model_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write_pickle(tiny_model_folder("qwen2"), tmp_path / "model")
    torch.save({"model.norm.weight": _Payload()}, path / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AptqError, match="hold more than tensors"):
        open_model(ModelSettings(path=str(path), allow_pickle=True))
    assert not (tmp_path / "owned").exists()


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny LLaMA in a GGUF, float32, with a byte-level tokenizer of one merge."""
    folder = tmp_path_factory.mktemp("gguf")
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer = gguf.GGUFWriter(str(folder / "tiny.gguf"), "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3] * 4 + [1] * (len(tokens) - 4))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), 64), "output_norm": (64,)}
    block = {"attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64)}
    block |= {"attn_output": (64, 64), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    shapes |= {f"blk.{index}.{name}": shape for index in range(2) for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", 0.1 * random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def test_gguf_is_resident(gguf_folder: Path) -> None:
    source = open_model(ModelSettings(path=str(gguf_folder), gguf_file="tiny.gguf"))
    assert source.resident_reason is not None
    assert "GGUF" in source.resident_reason
    assert source.dtype == torch.float32
    assert source.block_names == ("model.layers.0", "model.layers.1")
    assert source.layer_shapes()["model.layers.1.mlp.gate_proj"] == (96, 64)
    assert len(source.tokenizer("hello").input_ids) == 5
    assert source.fingerprint() == open_model(ModelSettings(path=str(gguf_folder / "tiny.gguf"))).fingerprint()
    _check_resident(source)


def test_gguf_errors(gguf_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AptqError, match=r"there is no 'other.gguf'.*GGUF files there: tiny.gguf"):
        open_model(ModelSettings(path=str(gguf_folder), gguf_file="other.gguf"))
    with pytest.raises(AptqError, match=r"no config.json.*model.gguf_file=tiny.gguf"):
        open_model(ModelSettings(path=str(gguf_folder)))
    (tmp_path / "bad.gguf").write_bytes(b"not one")
    with pytest.raises(AptqError, match="does not begin as a GGUF"):
        open_model(ModelSettings(path=str(tmp_path), gguf_file="bad.gguf"))


def test_resident_mixture_gives_views_of_its_experts(tiny_model_folder: Make, tmp_path: Path) -> None:
    path = _write_pickle(tiny_model_folder("mixtral"), tmp_path)
    source = open_model(ModelSettings(path=str(path), allow_pickle=True))
    assert "model.layers.2.mlp.experts.3.down_proj" in source.layer_shapes()
    unfuse = source.load_full()
    unfuse_experts(unfuse)
    block = source.load_block(2, "cpu")
    name = "model.layers.2.mlp.experts.3.down_proj"
    block.layers[name].set_weight(torch.zeros(64, 48))
    source.release_block(2)
    _check(source, unfuse)
