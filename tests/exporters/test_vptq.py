"""The checkpoint of the package vptq: its config as transformers checks it, its tensors by an unpacker of our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig
from transformers.utils.quantization_config import VptqConfig, VptqLayerConfig

import aptq
from aptq.api import AptqError, Option
from aptq.experiment import export
from aptq.exporters.vptq import VPTQ
from aptq.formats.integer import Integer
from aptq.formats.vector import Vector

SHAPES = {"model.layers.0.mlp.up_proj": (64, 64)}
SMALL = ["format.iterations=3", "format.refits=0"]


def _stream(words: list[int], bits: int, count: int) -> list[int]:
    """Read a row's codes from its words, as numbers of any size."""
    stream = sum((word % (1 << 32)) << (32 * at) for at, word in enumerate(words))
    return [stream >> (bits * at) & ((1 << bits) - 1) for at in range(count)]


def _dense(tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """Decode a layer as ``VQuantLinear`` is described to, one vector after the other."""
    out, inputs = config["out_features"], config["in_features"]
    groups, size, outliers = config["group_num"], config["group_size"], config["outlier_size"]
    (finer_length, length), (_, count) = config["vector_lens"], config["num_centroids"]
    residual = config["num_res_centroids"][1]
    bits = count.bit_length() - 1 + (residual.bit_length() - 1 if residual > 0 else 0)
    stored = torch.zeros(-(-out // length) * length, inputs)
    for group in range(groups):
        main = tensors["centroids.weight"][group].float().view(count, length)
        rest = tensors["res_centroids.weight"][group].float().view(residual, length) if residual > 0 else None
        for row, words in enumerate(tensors["indices"][group].tolist()):
            for column, word in enumerate(_stream(words, bits, size)):
                vector = main[word % count]
                if rest is not None:
                    vector = vector + rest[word // count]
                stored[row * length : (row + 1) * length, outliers + group * size + column] = vector
    weight = stored[:out]
    if outliers:
        finer = tensors["outlier_centroids.weight"][0].float().view(-1, finer_length)
        indices = tensors["outlier_indices"][0].long() & 0xFFFF
        weight[:, :outliers] = finer[indices].transpose(1, 2).flatten(0, 1)[:out]
    if config["enable_perm"]:
        weight = weight[:, torch.argsort(tensors["perm"].long() & 0xFFFF)]
    if config["enable_norm"]:
        weight = weight * tensors["weight_scale"].float() + tensors["weight_bias"].float()
    return weight


@pytest.fixture
def run(quantized: Callable[..., aptq.Run]) -> Callable[..., aptq.Run]:
    return partial(quantized, "format=vector", "hessian=input", "allocator=uniform", "allocator.bits=2", *SMALL)


@pytest.mark.parametrize(
    "words",
    [
        ["format.bits_2=v4-k16", "format.normalize=columns"],
        ["format.bits_2=v4-k16-4", "format.normalize=none", "format.group_size=32"],
        [
            "format.bits_2=v8-k16-4",
            "format.outliers=0.125",
            "format.outlier_codebook=v4-k32",
            "format.normalize=columns",
        ],
    ],
    ids=["columns", "residual, groups", "outliers"],
)
def test_holds_the_very_same_weights(words: list[str], run: Callable[..., aptq.Run]) -> None:
    done = run("exporter=vptq", *words)
    folder = done.folder / "exports/vptq"
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert told.pop("quant_method") == "vptq"
    config = VptqConfig(**told)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    model = aptq.load(done.folder / "model")
    plan = done.plan()
    assert plan is not None
    for name in list(plan.layers)[:7]:  # one block
        layer = config.config_for_layers[name]
        assert VptqLayerConfig(**layer).in_features == layer["in_features"]
        mine = {key.removeprefix(f"{name}."): each for key, each in tensors.items() if key.startswith(f"{name}.")}
        assert mine["indices"].dtype == torch.int32
        assert f"{name}.weight" not in tensors
        assert torch.allclose(_dense(mine, layer), model.get_submodule(name).dense(), rtol=1e-6, atol=0)


def test_a_finished_run_is_exported(run: Callable[..., aptq.Run]) -> None:
    done = run("format.bits_2=v4-k16", "format.normalize=none")
    folder = export(["exporter=vptq", f"run={done.folder}"])
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("format", "message"),
    [
        (Integer(), "stores vector codebooks with column scales or none; got format=x"),
        (Vector(), "format.normalize=columns"),
        (Vector(bits_2="v3-k64", normalize="none"), "no kernel for vectors of 3 with indices of 6"),
        (Vector(normalize="none", outliers=0.1), "outlier vectors of 4 only; set format.outlier_codebook=v4-k256"),
        (Vector(normalize="none", group_size=24), "do not make 3 groups of one size"),
    ],
)
def test_what_the_reader_cannot_take_is_refused(format: Integer | Vector, message: str) -> None:
    with pytest.raises(AptqError, match=message):
        VPTQ().check(format, "x", [Option(2, format.group_size)], shapes=SHAPES, config=LlamaConfig(dtype="float32"))


def test_the_model_must_not_round_codebooks_once_more() -> None:
    option, format = [Option(2, -1)], Vector(normalize="none")
    with pytest.raises(AptqError, match="set format.scale_dtype=bfloat16"):
        VPTQ().check(format, "x", option, shapes=SHAPES, config=LlamaConfig(dtype="bfloat16"))
    VPTQ().check(format, "x", option, shapes=SHAPES, config=LlamaConfig(dtype="float16"))
    with pytest.raises(AptqError, match="Linear layers only"):
        VPTQ().check(format, "x", option, shapes={"a.experts.0.up": (64, 64)}, config=LlamaConfig())
