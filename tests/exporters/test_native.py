from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig

from aptq.api import AptqError, Exporter, ExportJob, Option
from aptq.exporters.native import Native
from aptq.formats.integer import Integer

PLAN = {"model.layers.0.mlp.up_proj": Option(4, 64), "model.layers.0.mlp.down_proj": Option(3, -1)}
PACKED = {
    "model.layers.0.mlp.up_proj": {"qweight": torch.arange(64, dtype=torch.int32).reshape(2, 4, 8)},
    "model.layers.0.mlp.down_proj": {
        "qweight": torch.ones(1, 3, 5, dtype=torch.int32),
        "scales": torch.ones(1, 5, dtype=torch.float16),
    },
}
OTHERS = {"model.embed_tokens.weight": torch.randn(10, 8), "model.norm.weight": torch.ones(8)}


def job() -> ExportJob:
    def others() -> Iterator[tuple[str, Tensor]]:
        yield from OTHERS.items()

    return ExportJob(
        plan=PLAN,
        shapes={"model.layers.0.mlp.up_proj": (8, 64), "model.layers.0.mlp.down_proj": (5, 32)},
        format=Integer(),
        format_config={"name": "integer", "group_size": 64, "symmetric": True},
        packed=PACKED.__getitem__,
        full_precision=others,
        config=LlamaConfig(hidden_size=8, num_attention_heads=2, vocab_size=10),
        generation_config=GenerationConfig(max_new_tokens=7),
        tokenizer=None,
        provenance={"aptq": "0.1.0", "data": {"source": "pydoc"}},
    )


def test_the_folder_holds_tensors_config_and_generation_config(tmp_path: Path) -> None:
    exporter = Native()
    assert isinstance(exporter, Exporter)
    exported = job()
    exporter.export(exported, tmp_path / "model")
    expected = dict(OTHERS)
    for layer, tensors in PACKED.items():
        expected |= {f"{layer}.{name}": tensor for name, tensor in tensors.items()}
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"] == {
        "quant_method": "aptq",
        "version": 1,
        "format": {"name": "integer", "group_size": 64, "symmetric": True},
        "layers": {
            "model.layers.0.mlp.up_proj": {"bits": 4, "group_size": 64},
            "model.layers.0.mlp.down_proj": {"bits": 3, "group_size": -1},
        },
        "provenance": {"aptq": "0.1.0", "data": {"source": "pydoc"}},
    }
    assert GenerationConfig.from_pretrained(tmp_path / "model").max_new_tokens == 7
    assert not hasattr(exported.config, "quantization_config")


def test_large_models_are_sharded(tmp_path: Path) -> None:
    Native(max_shard_size=330).export(job(), tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == 3
    assert all(torch.equal(load_file(tmp_path / index[name])[name], tensor) for name, tensor in OTHERS.items())


def test_check_accepts_what_the_format_can_pack() -> None:
    Native().check(Integer(), "integer", [Option(2, 32), Option(8, -1)], shapes={"a": (8, 64)}, config=None)


def test_check_refuses_a_dtype_that_cannot_be_stored() -> None:
    class Odd(Integer):
        def packed_layout(
            self, option: Option, shape: tuple[int, int]
        ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
            return {"phases": ((1,), torch.complex64)}

    with pytest.raises(AptqError, match=r"odd packs phases as torch.complex64.*float16"):
        Native().check(Odd(), "odd", [Option(4, 64)], shapes={"a": (8, 64)}, config=None)


def test_a_shard_size_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(AptqError, match="max_shard_size"):
        Native(max_shard_size="many")
