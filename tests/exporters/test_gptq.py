"""GPTQ's checkpoints: the codes as those who read them take them apart."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPTQConfig, LlamaConfig

import aptq
from aptq.api import AptqError, Exporter, Option
from aptq.exporters.gptq import GPTQ
from aptq.formats.float import Float
from aptq.formats.integer import Integer

SHAPES = {"model.layers.0.mlp.up_proj": (64, 128)}
LLAMA = LlamaConfig(dtype="float32")


@pytest.fixture
def run(quantized: Callable[..., aptq.Run]) -> Callable[..., aptq.Run]:
    return partial(quantized, "format.group_size=32", "exporter=gptq", "target=gptq")


def integers(stream: Tensor, bits: int) -> Tensor:
    """Take words ``[words, n]`` apart into codes ``[words 32 / bits, n]``, the first in the lowest bits of all."""
    columns = []
    for column in stream.T.tolist():
        whole = sum((word & 0xFFFFFFFF) << (32 * at) for at, word in enumerate(column))
        columns.append([whole >> (bits * at) & ((1 << bits) - 1) for at in range(len(column) * 32 // bits)])
    return torch.tensor(columns, dtype=torch.float32).T


def options_of(config: dict, name: str) -> dict | None:
    """Return what a reader makes of a layer: the first pattern of ``dynamic`` that matches, or the common option."""
    for pattern, override in config.get("dynamic", {}).items():
        if re.match(pattern[2:], name):
            return None if pattern.startswith("-:") else {**config, **override}
    return config


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_reader_finds_the_very_same_weights(symmetric: bool, run: Callable[..., aptq.Run]) -> None:
    mixed = "allocator.pin={*.0.mlp.down_proj: 8, *.1.mlp.down_proj: 3, *.0.self_attn.q_proj: 2}"
    done = run(f"format.symmetric={str(symmetric).lower()}", "allocator.bits=[2,3,4,8]", "allocator.budget=3.9", mixed)
    folder = done.folder / "exports" / "gptq"
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["sym"] is symmetric
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    stored = load_file(folder / "model.safetensors")
    ours = AutoModelForCausalLM.from_pretrained(done.model_folder)
    plan = done.plan()
    assert plan is not None
    assert {2, 3, 8} <= {option.bits for option in plan.layers.values()}
    for name, option in plan.layers.items():
        read = options_of(config, name)
        assert read is not None
        assert (read["bits"], read["group_size"]) == (option.bits, option.group_size), name
        codes = integers(stored[f"{name}.qweight"], option.bits)  # [in, out]
        zeros = integers(stored[f"{name}.qzeros"].T, option.bits).T + symmetric  # [groups, out]
        group = stored[f"{name}.g_idx"].long()
        weight = (codes - zeros[group]) * stored[f"{name}.scales"].float()[group]
        layer = ours.get_submodule(name)
        quantized = layer.format.unpack(layer.packed(), layer.option, (layer.out_features, layer.in_features))
        assert torch.equal(weight.T, layer.format.dequantize(quantized, layer.option)), name


def test_the_config_is_one_that_transformers_knows(run: Callable[..., aptq.Run]) -> None:
    done = run("allocator=uniform", "allocator.bits=4", "format.symmetric=true")
    config = json.loads((done.folder / "exports/gptq/config.json").read_text())["quantization_config"]
    assert "dynamic" not in config
    known = GPTQConfig.from_dict(config)
    assert (known.bits, known.group_size, known.sym, known.desc_act) == (4, 32, True, False)


def test_stacks_and_layers_left_out_are_told_by_name(run: Callable[..., aptq.Run]) -> None:
    done = run(
        "fused=true",
        "allocator.bits=[3,4]",
        "allocator.budget=3.9",
        "allocator.pin={*.0.self_attn.*: 3}",
        "model.skip=['*.1.mlp.down_proj']",
    )
    config = json.loads((done.folder / "exports/gptq/config.json").read_text())["quantization_config"]
    assert options_of(config, "model.layers.1.mlp.down_proj") is None
    stack = options_of(config, "model.layers.0.self_attn.qkv_proj")
    assert stack is not None
    assert stack["bits"] == 3


def test_what_can_be_written() -> None:
    exporter = GPTQ()
    assert isinstance(exporter, Exporter)
    options = [Option(3, 64), Option(4, -1)]
    for symmetric in (True, False):
        exporter.check(Integer(symmetric=symmetric), "integer", options, shapes=SHAPES, config=LLAMA)
    with pytest.raises(AptqError, match="format=integer"):
        exporter.check(Float(), "float", options, shapes=SHAPES, config=LLAMA)
    with pytest.raises(AptqError, match="serves 2, 3, 4, 8 bits; got bits=5"):
        exporter.check(Integer(), "integer", [Option(5, 64)], shapes=SHAPES, config=LLAMA)
    bfloat16 = replace(Integer(), scale_dtype="bfloat16")
    with pytest.raises(AptqError, match="scale_dtype=float16"):
        exporter.check(bfloat16, "integer", options, shapes=SHAPES, config=LLAMA)
    with pytest.raises(AptqError, match=r"a\.up_proj is 33 x 128"):
        exporter.check(Integer(), "integer", options, shapes={"a.up_proj": (33, 128)}, config=LLAMA)
    with pytest.raises(AptqError, match="Conv1D"):
        exporter.check(Integer(), "integer", options, shapes=SHAPES, config=GPT2Config())
