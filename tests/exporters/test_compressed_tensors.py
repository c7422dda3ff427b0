"""What others load: the same codes, as they read them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import aptq
from aptq import packing
from aptq.api import AptqError, Exporter, Option
from aptq.experiment import evaluate, export
from aptq.exporters.compressed_tensors import CompressedTensors
from aptq.formats.float import Float
from aptq.formats.integer import Integer

SYMMETRIC = Integer(symmetric=True)
SHAPES = {"model.layers.0.mlp.up_proj": (8, 128)}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_are_packed_as_the_library_does(bits: int) -> None:
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", exc_type=ImportError)
    codes = torch.randint(0, 1 << bits, (6, 96), dtype=torch.uint8)
    signed = (codes.int() - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(packing.pack_rows(codes, bits), library.pack_to_int32(signed, bits))


@pytest.fixture
def run(quantized: Callable[..., aptq.Run]) -> Callable[..., aptq.Run]:
    return partial(
        quantized, "format.symmetric=true", "format.group_size=32", "allocator.bits=[2,3,4,8]", "allocator.budget=3.7"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_the_very_same_weights(dtype: str, run: Callable[..., aptq.Run], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    chosen = ["exporter=compressed_tensors", "target=transformers", f"format.scale_dtype={dtype}"]
    done = run(*chosen, "allocator.pin={*.0.mlp.down_proj: 8, *.1.mlp.down_proj: 3}", dtype=dtype)
    plan = done.plan()
    assert plan is not None
    assert len({option.bits for option in plan.layers.values()}) > 2
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(done.folder / folder).eval()
        for folder in ("model", "exports/compressed_tensors")
    )
    tokens = torch.randint(5, 200, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = ours(tokens).logits, theirs(tokens).logits
    assert torch.allclose(expected.float(), found.float(), atol=1e-5 if dtype == "float32" else 3e-2)
    for name in plan.layers:
        layer = ours.get_submodule(name)
        quantized = layer.format.unpack(layer.packed(), layer.option, (layer.out_features, layer.in_features))
        weight = theirs.get_submodule(name).weight
        assert torch.equal(layer.format.dequantize(quantized, layer.option).to(weight.dtype), weight), name


def test_a_finished_run_is_exported_and_judged_by_the_command_line(
    run: Callable[..., aptq.Run], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    done = run("transform=none")
    folder = export([f"run={done.folder}", "exporter=compressed_tensors"])
    assert folder == done.folder / "exports" / "compressed_tensors"
    text = tmp_path / "text.txt"
    judged = [
        evaluate(
            [
                f"model.path={path}",
                "data=text",
                f"data.evaluation_path={text}",
                "evaluator.num_sequences=2",
                "evaluator.sequence_length=64",
                "fabric=cpu",
            ]
        )["perplexity"]["text"]
        for path in (done.model_folder, folder)
    ]
    assert judged[0] == pytest.approx(judged[1], rel=1e-5)


def test_it_is_refused_before_any_work_what_readers_cannot_take(run: Callable[..., aptq.Run], tmp_path: Path) -> None:
    with pytest.raises(AptqError, match="format.symmetric=true"):
        run("exporter=compressed_tensors", "format.symmetric=false")
    with pytest.raises(AptqError, match="reads what exporter=compressed_tensors writes"):
        run("target=vllm")
    with pytest.raises(AptqError, match="vllm_cpu serves 4 bits"):
        run("target=vllm_cpu", "exporter=compressed_tensors")
    assert not (tmp_path / "run").exists()


def test_what_can_be_written() -> None:
    exporter = CompressedTensors()
    assert isinstance(exporter, Exporter)
    llama, options = LlamaConfig(dtype="float32"), [Option(3, 64), Option(4, -1)]
    exporter.check(SYMMETRIC, "integer", options, shapes=SHAPES, config=llama)
    for format, name in ((Integer(), "integer"), (Float(), "float")):
        with pytest.raises(AptqError, match="symmetric=true"):
            exporter.check(format, name, options, shapes=SHAPES, config=llama)
    with pytest.raises(AptqError, match="96 does not divide the 128 of model.layers.0"):
        exporter.check(SYMMETRIC, "integer", [Option(4, 96)], shapes=SHAPES, config=llama)
    with pytest.raises(AptqError, match="format.scale_dtype=bfloat16"):
        exporter.check(SYMMETRIC, "integer", options, shapes=SHAPES, config=LlamaConfig(dtype="bfloat16"))
    scaled = replace(SYMMETRIC, scale_dtype="bfloat16")
    exporter.check(scaled, "integer", options, shapes=SHAPES, config=LlamaConfig(dtype="bfloat16"))
    with pytest.raises(AptqError, match="mixtures of experts"):
        exporter.check(SYMMETRIC, "integer", options, shapes={"a.experts.0.up_proj": (8, 128)}, config=llama)
    with pytest.raises(AptqError, match="Conv1D"):
        exporter.check(SYMMETRIC, "integer", options, shapes=SHAPES, config=GPT2Config())
