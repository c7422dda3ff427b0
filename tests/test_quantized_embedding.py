"""Runs whose input embedding is quantized, through the public Python interface."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaModel

import aptq
from aptq.api import AptqError, ExportJob
from aptq.embedding import PackedEmbedding
from aptq.exporters.native import Native
from aptq.layer import PackedLinear

Overrides = Callable[..., list[str]]
TOKENS = torch.arange(24).reshape(2, 12) * 7 % 250 + 4
TEXT = "The quick brown fox jumps over the lazy dog, and the dog, being lazy, lets it. "


@pytest.fixture
def overrides(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> Overrides:
    """Return what a small run with an embedding of 8 bits needs; later overrides win."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i}. {TEXT * 3}" for i in range(60)))

    def make(*more: str, family: str = "llama", folder: str = "run") -> list[str]:
        return [
            f"model.path={tiny_model_folder(family)}",
            *("data=text", f"data.path={text}", f"data.evaluation_path={{fox: {text}}}"),
            *("data.num_samples=4", "data.sequence_length=64", "data.batch_size=2"),
            *([] if "evaluator=none" in more else ["evaluator.num_sequences=2"]),
            *("format.group_size=32", "allocator=uniform", "fabric=cpu", "callback=none", "samples=1"),
            *("model.quantize_embeddings=8", "model.embedding_group_size=32"),
            *(f"cache_dir={tmp_path / 'cache'}", f"run.dir={tmp_path / folder}"),
            *more,
        ]

    return make


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def _dense(folder: Path, original: Path) -> Any:
    """Return the original model with the weights that a written model's tensors stand for."""
    packed = aptq.load(folder, backend="reference")
    dense = AutoModelForCausalLM.from_pretrained(original)
    for name, module in packed.named_modules():
        if isinstance(module, PackedEmbedding | PackedLinear):
            own = dense.get_submodule(name)
            weight = module.dense() if isinstance(module, PackedLinear) else module.stored()
            own.weight = torch.nn.Parameter(weight.T if type(own).__name__ == "Conv1D" else weight)
    return dense


@pytest.mark.parametrize(
    ("family", "head"),
    [
        *((family, False) for family in ("llama", "llama_untied", "gemma2", "gemma3", "qwen2", "opt", "gpt2", "phi")),
        *((family, True) for family in ("llama", "llama_untied", "gpt2")),
    ],
)
def test_the_whole_way(
    family: str, head: bool, overrides: Overrides, tiny_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    run = aptq.quantize(overrides(f"model.quantize_head={head}", family=family))
    original = AutoModelForCausalLM.from_pretrained(tiny_model_folder(family))
    model, info = AutoModelForCausalLM.from_pretrained(run.model_folder, output_loading_info=True)
    assert not any(info.values()), info
    embedding, last = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    tied = original.config.tie_word_embeddings and not head
    assert isinstance(last, PackedLinear) == (head or tied)
    assert bool(getattr(last, "_holders", ())) == tied
    names = set(_tensors(run.model_folder))
    name = next(key for key, module in original.named_modules() if module is original.get_input_embeddings())
    assert {f"{name}.qweight", f"{name}.scales", f"{name}.qzeros"} <= names
    assert f"{name}.weight" not in names
    assert ("lm_head.qweight" in names) == head
    assert ("lm_head.weight" in names) == (not head and not tied)
    shape = (embedding.num_embeddings, embedding.embedding_dim)
    for each in model.state_dict().values():
        assert not (each.is_floating_point() and tuple(each.shape) == shape) or not (tied or head)
    torch.testing.assert_close(
        _logits(model), _logits(_dense(run.model_folder, tiny_model_folder(family))), rtol=1e-4, atol=1e-4
    )
    assert model.generate(TOKENS[:, :4], max_new_tokens=4, do_sample=False).shape == (2, 8)
    metrics = run.metrics()
    assert metrics["perplexity"]["fox"] == pytest.approx(metrics["baseline_perplexity"]["fox"], rel=0.2)
    model.save_pretrained(tmp_path / "again")
    again = aptq.load(tmp_path / "again")
    assert _tensors(tmp_path / "again").keys() == names
    assert torch.equal(_logits(again), _logits(model))
    assert again.get_input_embeddings().scale == embedding.scale


def test_gemmas_own_scale_is_kept(overrides: Overrides) -> None:
    run = aptq.quantize(overrides("evaluator=none", family="gemma3"))
    entry = json.loads((run.model_folder / "config.json").read_text())["quantization_config"]["embedding"]
    assert entry == {
        "name": "model.embed_tokens",
        "bits": 8,
        "group_size": 32,
        "format": {"name": "integer", "group_size": 32, "symmetric": False, "scale_dtype": "float16"},
        "scale": 8.0,
        "head": "lm_head",
    }
    assert aptq.load(run.model_folder).get_input_embeddings().scale == 8.0


def test_the_sizes_that_are_told_are_those_on_disk(overrides: Overrides, tmp_path: Path) -> None:
    for bits in ("null", 8, 3):
        aptq.quantize(overrides(f"model.quantize_embeddings={bits}", folder=f"{bits}"))
    plain, eight, three = (aptq.Run.read(tmp_path / name).metrics() for name in ("null", "8", "3"))
    codes, scales, zeros = 260 * 64, 260 * 2 * 2, 2 * 9 * 32  # zeros are padded to units of 32 rows
    packed = codes + scales + zeros
    assert plain["bytes"]["model"] - eight["bytes"]["model"] == pytest.approx(260 * 64 * 4 - packed, abs=400)
    assert eight["bytes"]["model"] - three["bytes"]["model"] == pytest.approx((codes + zeros) * 5 / 8, abs=400)
    assert plain["bits"] == eight["bits"] == three["bits"], "averages are of the layers"
    assert plain["bytes"]["original"] == eight["bytes"]["original"]
    assert sum(each["layers"] for each in eight["backends"]) == len(aptq.Run.read(tmp_path / "8").layers()) + 1
    budget = json.loads((tmp_path / "8" / "plan.json").read_text())["budget"]
    assert budget["embedding"] == {"bits": 8, "group_size": 32}


@pytest.mark.parametrize(("family", "head"), [("llama", False), ("llama", True), ("llama_untied", False)])
def test_a_budget_of_the_whole_model_counts_the_packed_table(family: str, head: bool, overrides: Overrides) -> None:
    more = ["metric=error", "allocator=knapsack", "allocator.count=model", f"model.quantize_head={head}"]
    megabytes = 0.085 if family == "llama" else 0.14
    run = aptq.quantize(overrides(*more, f"allocator.budget={megabytes}", "evaluator=none", family=family))
    size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(run.model_folder).values())
    assert 0.9 * megabytes < size / 1e6 <= megabytes
    assert len({option.bits for option in run.plan().layers.values()}) > 1  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "more",
    [
        ["prefix=full_precision"],
        ["quantizer=gptaq"],
        ["true_sequential=false", "transform=hadamard"],
        ["model.dtype=bfloat16", "activation=block_scaled"],
        ["hessian=loss", "metric=output", "allocator=knapsack", "allocator.budget=3.5", "audit=2"],
    ],
)
def test_other_ways_to_calibrate_end_in_a_model_that_agrees(family: str, more: list[str], overrides: Overrides) -> None:
    run = aptq.quantize(overrides(*more, "model.quantize_embeddings=3", family=family))
    metrics = run.metrics()
    assert metrics["perplexity"]["fox"] == pytest.approx(metrics["baseline_perplexity"]["fox"], rel=0.5)


def test_blocks_are_calibrated_on_what_the_quantized_embedding_feeds_them(overrides: Overrides, tmp_path: Path) -> None:
    for prefix in ("quantized", "full_precision"):
        for bits in ("null", 2):
            settings = [f"prefix={prefix}", f"model.quantize_embeddings={bits}"]
            aptq.quantize(overrides(*settings, "evaluator=none", folder=f"{prefix}-{bits}"))
    first = {
        path.name: aptq.Run.read(path).layers()[0].trace
        for path in tmp_path.iterdir()
        if path.name.startswith(("quantized", "full"))
    }
    assert first["full_precision-2"] == first["full_precision-null"] == first["quantized-null"]
    assert first["quantized-2"] != first["quantized-null"]


_KILLED = """
import os, signal, sys
from aptq.block_store import BlockStore
import aptq
save = BlockStore.save
def save_and_die(self, index, tensors, reports):
    save(self, index, tensors, reports)
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
BlockStore.save = save_and_die
aptq.quantize(sys.argv[1:])
"""


def _same(a: Path, b: Path) -> bool:
    one, two = _tensors(a / "model"), _tensors(b / "model")
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_kill_9_and_resume_gives_the_same_bits(overrides: Overrides, tmp_path: Path) -> None:
    words = ["evaluator=none", "model.quantize_embeddings=3"]
    aptq.quantize(overrides(*words, folder="whole"))
    killed = overrides(*words, folder="killed")
    process = subprocess.run([sys.executable, "-c", _KILLED, *killed], env={**os.environ}, check=False)
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(AptqError, match=r"model\.quantize_embeddings: 3 -> 4"):
        aptq.quantize([*killed, "model.quantize_embeddings=4"])
    run = aptq.quantize(killed)
    assert run.resumed
    assert _same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.distributed
def test_two_ranks_agree_with_one(overrides: Overrides, tmp_path: Path) -> None:
    words = ["evaluator=none", "quantizer=nearest", "format.clip_steps=0", "model.quantize_embeddings=4"]
    aptq.quantize(overrides(*words, folder="one"))
    command = [sys.executable, "-m", "aptq", *overrides(*words, folder="two"), "fabric=two_ranks"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert _same(tmp_path / "one", tmp_path / "two")


def test_a_finished_run_is_evaluated_exported_and_reported(overrides: Overrides, tmp_path: Path) -> None:
    run = aptq.quantize(overrides("transform=none"))
    arguments = [each for each in overrides() if each.startswith(("data", "evaluator", "fabric", "callback"))]
    kept = [each for each in arguments if not each.startswith(("data.num_samples", "data.batch", "data.seq"))]
    kept.append("evaluator.sequence_length=64")
    from aptq.experiment import evaluate, export
    from aptq.report import write_report

    found = evaluate([*kept, f"model.path={run.model_folder}"])
    assert found["perplexity"]["fox"] == pytest.approx(run.metrics()["perplexity"]["fox"], rel=1e-5)
    folder = export([f"run={run.folder}", f"output={tmp_path / 'exported'}", "exporter=native"])
    one, two = _tensors(run.model_folder), _tensors(folder)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(_logits(aptq.load(folder)), _logits(aptq.load(run.model_folder)))
    with pytest.raises(AptqError, match="exporter=gptq cannot store a packed embedding"):
        export([f"run={run.folder}", f"output={tmp_path / 'other'}", "exporter=gptq"])
    assert "The embedding, beside them, has 8 bits of code a weight" in write_report(run.folder).read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": 3}, "quantization_config.embedding must have name, bits, group_size and format"),
        ({"colour": "red"}, "quantization_config.embedding must have name"),
        ({"format": {"group_size": 64}}, "quantization_config.embedding must have name"),
        ({"bits": 9}, "2 to 8 bits"),
        ({"format": {"name": "float"}}, "Format float cannot unpack single rows"),
        ({"name": "model.words"}, "says that model.words is a packed embedding, and LlamaForCausalLM has none there"),
        ({"name": "model.norm"}, "LlamaForCausalLM has a LlamaRMSNorm there"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str, overrides: Overrides) -> None:
    run = aptq.quantize(overrides("evaluator=none"))
    path = run.model_folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["embedding"] |= changes
    if changes.get("format", {}).get("name") == "float":
        config["quantization_config"]["embedding"]["bits"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(AptqError, match=message):
        aptq.load(run.model_folder)


_FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.get_input_embeddings()).__name__ == "PackedEmbedding"
print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).tolist())
"""


def test_a_fresh_process_loads_it_without_importing_aptq(overrides: Overrides) -> None:
    run = aptq.quantize(overrides("evaluator=none"))
    done = subprocess.run([sys.executable, "-c", _FRESH, run.model_folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model = aptq.load(run.model_folder)
    assert str(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).tolist()) in done.stdout


def test_the_base_model_loads_alone(overrides: Overrides) -> None:
    run = aptq.quantize(overrides("evaluator=none"))
    base, whole = LlamaModel.from_pretrained(run.model_folder), aptq.load(run.model_folder)
    assert isinstance(base.embed_tokens, PackedEmbedding)
    with torch.no_grad():
        assert torch.equal(base(TOKENS).last_hidden_state, whole.model(TOKENS).last_hidden_state)


@pytest.mark.parametrize("tensor", ["qweight", "scales", "qzeros"])
def test_a_damaged_table_does_not_become_the_model(
    tensor: str, overrides: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = Native.export

    def damaged(self: Native, job: ExportJob, folder: Path) -> None:
        from safetensors.torch import save_file

        export(self, job, folder)
        tensors = _tensors(folder)
        tensors[f"model.embed_tokens.{tensor}"][..., -1] += 1
        save_file(tensors, folder / "model.safetensors")

    monkeypatch.setattr(Native, "export", damaged)
    with pytest.raises(AptqError, match=f"model.embed_tokens.{tensor} in the written model is not what it was"):
        aptq.quantize(overrides("evaluator=none"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.quantize_embeddings=1"], "quantize_embeddings=1 is not allowed; use 2 to 8 bits"),
        (["model.quantize_embeddings=9"], "quantize_embeddings=9 is not allowed; use 2 to 8 bits"),
        (["model.quantize_embeddings=many"], "quantize_embeddings cannot be .many."),
        (["model.embedding_group_size=0"], r"embedding_group_size=0 is not allowed; use -1"),
        (["exporter=compressed_tensors", "format.symmetric=true"], "exporter=compressed_tensors cannot store a packed"),
        (["exporter=gptq", "target=gptq"], "exporter=gptq cannot store a packed embedding"),
        (["exporter=vptq"], "exporter=vptq cannot store a packed embedding"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    words: list[str], message: str, overrides: Overrides, tmp_path: Path
) -> None:
    with pytest.raises(AptqError, match=message):
        aptq.quantize(overrides(*words))
    assert not (tmp_path / "run").exists()
