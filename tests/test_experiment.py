"""The main job on a tiny model, through the public Python interface."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import aptq
from aptq.api import AptqError
from aptq.packing import unpack
from aptq.plan import read_plan
from aptq.run_folder import read_config

Folder = Callable[..., Path]
MIXED = ["format.formats.integer", "format.formats.asymmetric_float"]
INNER = ["format.inner"]
GROUPED = {"format=mixed": MIXED} | dict.fromkeys(("format=scaled", "format=outliers", "format=group_bits"), INNER)
"""Where formats that are made of others have their group sizes."""
TEXT = "The quick brown fox jumps over the lazy dog, and the dog, being lazy, lets it. "


@pytest.fixture
def overrides(tiny_model_folder: Folder, tmp_path: Path) -> Callable[..., list[str]]:
    """Return what a small run needs; later overrides win."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i}. {TEXT * 3}" for i in range(60)))

    def make(*more: str, family: str = "llama", folder: str = "run") -> list[str]:
        return [
            f"model.path={tiny_model_folder(family)}",
            "data=text",
            f"data.path={text}",
            f"data.evaluation_path={{fox: {text}}}",
            "data.num_samples=4",
            "data.sequence_length=64",
            "data.batch_size=2",
            *([] if "evaluator=none" in more else ["evaluator.num_sequences=2"]),
            *(
                f"{part}.group_size=32"
                for part in next((GROUPED[word] for word in more if word in GROUPED), ["format"])
            ),
            "fabric=cpu",
            "callback=none",
            # Quicker than the defaults; an experiment has its own.
            *([] if any(word.startswith("experiment=") for word in more) else ["metric=error", "allocator=ratio"]),
            "samples=1",
            f"cache_dir={tmp_path / 'cache'}",
            f"run.dir={tmp_path / folder}",
            *more,
        ]

    return make


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def _same(a: Path, b: Path) -> bool:
    one, two = _tensors(a), _tensors(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_main_job(family: str, overrides: Callable[..., list[str]]) -> None:
    run = aptq.quantize(overrides("metric=output", "allocator=knapsack", family=family))
    names = {path.name for path in run.folder.iterdir()}
    assert {"config.yaml", "plan.json", "metrics.json", "layers.csv", "model"} <= names
    assert "blocks" not in names
    metrics = run.metrics()
    assert metrics["perplexity"]["fox"] == pytest.approx(metrics["baseline_perplexity"]["fox"], rel=0.2)
    assert 3.4 < metrics["bits"]["code"] <= 3.5 + 1e-9
    assert metrics["bits"]["storage"] > metrics["bits"]["code"]
    assert metrics["bytes"]["model"] < 0.5 * metrics["bytes"]["original"]
    assert metrics["peak_device_bytes"] is None
    assert sum(each["layers"] for each in metrics["backends"]) == len(aptq.Run.read(run.folder).layers())
    assert all("CUDA" in reason for each in metrics["backends"] for reason in each["refusals"]["triton"])
    plan = json.loads((run.folder / "plan.json").read_text())
    assert {3, 4} <= {entry["bits"] for entry in plan["layers"].values()} <= {2, 3, 4, 8}
    assert plan["budget"]["code_bits"] == pytest.approx(metrics["bits"]["code"])
    reports = {report.name: report for report in run.layers()}
    assert reports.keys() == plan["layers"].keys()
    assert all(report.predicted_cost is not None and report.predicted_cost > 0 for report in reports.values())
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("family", ["llama", "llama_untied"])
def test_the_head_is_quantized_when_asked(family: str, overrides: Callable[..., list[str]]) -> None:
    run = aptq.quantize(overrides("model.quantize_head=true", "allocator=uniform", family=family))
    assert run.layers()[-1].name == "lm_head"
    tensors = _tensors(run.folder)
    assert "lm_head.qweight" in tensors
    assert "model.embed_tokens.weight" in tensors, "the embedding stays in full precision"
    metrics = run.metrics()
    assert metrics["perplexity"]["fox"] == pytest.approx(metrics["baseline_perplexity"]["fox"], rel=0.2)


def test_a_plan_can_be_edited_and_run_again(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    aptq.quantize(overrides("evaluator=none", folder="first"))
    path = tmp_path / "first" / "plan.json"
    plan = json.loads(path.read_text())
    edited = "model.layers.1.mlp.down_proj"
    plan["layers"][edited]["bits"] = 8
    path.write_text(json.dumps(plan))
    run = aptq.quantize(overrides("evaluator=none", f"plan={path}", folder="second"))
    assert {report.name: report.bits for report in run.layers()}[edited] == 8
    budget = json.loads((run.folder / "plan.json").read_text())["budget"]
    assert budget["plan"] == str(path)
    assert budget["code_bits"] == run.metrics()["bits"]["code"]
    assert not {"measure", "allocate"} & run.metrics()["seconds"].keys(), "pass 1 is skipped when the plan is given"


def test_seeded_runs_are_bit_identical(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    for name in ("a", "b"):
        aptq.quantize(overrides("evaluator=none", f"cache_dir={tmp_path / name}-cache", folder=name))
    assert _same(tmp_path / "a", tmp_path / "b")


_KILLED = """
import os, signal, sys
from aptq.block_store import BlockStore
import aptq
save, left = BlockStore.save, int(sys.argv[1])
def save_and_die(self, index, tensors, reports):
    save(self, index, tensors, reports)
    if index == left:
        os.kill(os.getpid(), signal.SIGKILL)
BlockStore.save = save_and_die
aptq.quantize(sys.argv[2:])
"""


def test_kill_9_and_resume_gives_the_same_bits(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    aptq.quantize(overrides("evaluator=none", folder="whole"))
    arguments = overrides("evaluator=none", folder="killed")
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, "1", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / "killed" / "blocks").glob("*.json"))) == 2
    assert not (tmp_path / "killed" / "model").exists()
    run = aptq.quantize(arguments)
    assert run.resumed
    assert _same(tmp_path / "whole", tmp_path / "killed")


def test_a_finished_run_is_not_run_over(overrides: Callable[..., list[str]]) -> None:
    first = overrides("evaluator=none", "allocator=uniform")
    aptq.quantize(first)
    with pytest.raises(AptqError, match="finished"):
        aptq.quantize(first)
    run = aptq.quantize([*first, "allocator.bits=2", "overwrite=true"])
    assert run.metrics()["bits"]["code"] == 2.0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["allocator.budget=0.01", "allocator.count=model"], "cannot be kept: these 21 layers take between"),
        (["allocator.budget=2"], "between 3 and 4"),
        (["allocator.pin={nothing: 4}"], "no layer is left for 'nothing'"),
    ],
)
def test_budgets_that_no_plan_keeps_are_refused_before_anything_is_measured(
    overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.delattr("aptq.measurement.Measurement.statistics")
    with pytest.raises(AptqError, match=told):
        aptq.quantize(overrides("evaluator=none", "allocator=knapsack", "allocator.bits=[3,4]", *words))


def test_another_config_does_not_take_up_a_run(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    aptq.quantize(overrides("evaluator=none", "allocator=uniform"))
    (tmp_path / "run" / "metrics.json").unlink()
    with pytest.raises(AptqError, match=r"allocator\.bits: 4 -> 3"):
        aptq.quantize(overrides("evaluator=none", "allocator=uniform", "allocator.bits=3"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["quantizer=gptqq"], "Did you mean 'gptq'"),
        (["data.num_sample=3"], "num_samples"),
        (["+quantizer.damp=0.1"], "damping"),
        (["allocator=uniform", "allocator.bits=9"], "2 to 8 bits"),
        (["measure_bits=9"], "measure_bits=9: .*2 to 8 bits"),
        (["measure_bits=four"], "measure_bits cannot be 'four'"),
        (["format.group_size=40"], "multiples of 16"),
        (["target=vlm"], "native"),
        (["data.path=nowhere.txt"], "nowhere.txt"),
        (["data.sequence_length=4096"], "256"),
        (["data.num_samples=100000"], "num_samples"),
        (["model.path=no/such/folder"], "no/such/folder"),
        (["model.skip=[nothing_like_it]"], "nothing_like_it"),
        (["fabric.accelerator=abacus"], "abacus"),
        (["plan=nowhere.json"], "nowhere.json"),
        (["prefix=half"], "quantized, full_precision"),
        (["quantizer=gptaq", "prefix=full_precision"], "prefix=quantized"),
        (["quantizer=gptaq", "true_sequential=false"], "true_sequential=true"),
        (["quantizer=gptaq", "hessian=attention"], "hessian=attention cannot tell"),
        (["quantizer=gptaq", "hessian=identity"], "use hessian=input"),
        (["backend=nonsense"], "nonsense"),
        (["allocator=knapsack", "allocator.count=time"], "decode_times="),
        (["decode_times=nowhere.json"], "nowhere.json"),
        (["format=mixed"], "allocator=ratio chooses bits only"),
        (["format=mixed", "allocator=knapsack"], "allocator.count=storage"),
        (["activation=mxfp5"], "mxfp4"),
        (["activation=mxfp4", "quantizer=gptaq"], "with activation=block_scaled both would be quantized"),
        (
            ["activation=int8", "exporter=compressed_tensors", "format.symmetric=true", "format.scale_dtype=float32"],
            "exporter=compressed_tensors cannot store how a layer's inputs are quantized.*exporter=native",
        ),
        (["transform=hadamar"], "hadamard"),
        (
            [
                "transform=hadamard",
                "exporter=compressed_tensors",
                "format.symmetric=true",
                "format.scale_dtype=float32",
            ],
            "exporter=compressed_tensors cannot store that a layer's inputs are transformed.*exporter=native",
        ),
        (["format=block_clustered", "format.block_size=12"], "no whole number of blocks"),
    ],
)
def test_bad_input_is_one_clear_error_and_leaves_no_run(
    more: list[str], message: str, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    with pytest.raises(AptqError, match=message):
        aptq.quantize(overrides(*more))
    assert not (tmp_path / "run" / "plan.json").exists()


def test_drift_is_refused_in_a_mixture_of_experts(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    with pytest.raises(AptqError, match="mixture of experts"):
        aptq.quantize(overrides("quantizer=gptaq", family="mixtral"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "more", [["quantizer=gptaq"], ["quantizer=foem"], ["prefix=full_precision"]], ids=lambda more: more[0]
)
def test_other_inputs_and_targets_give_models_that_work(more: list[str], overrides: Callable[..., list[str]]) -> None:
    """From pass 1, which needs errors of this quantizer, to the check of what was written and the judgement."""
    metrics = aptq.quantize(overrides(*more, "model.quantize_head=true")).metrics()
    assert metrics["perplexity"]["fox"] == pytest.approx(metrics["baseline_perplexity"]["fox"], rel=0.2)


@pytest.mark.parametrize(
    "format", ["float", "asymmetric_float", "scaled", "vector format.iterations=2 format.refits=0 format.beam=2"]
)
def test_every_format_is_allocated_stored_and_loaded(format: str, overrides: Callable[..., list[str]]) -> None:
    more = [
        *f"format={format}".split(),
        "metric=output",
        "allocator=knapsack",
        "allocator.bits=[2,3,4]",
        "allocator.budget=3.4",
    ]
    run = aptq.quantize(overrides(*more))
    metrics = run.metrics()
    assert metrics["perplexity"]["fox"] == pytest.approx(metrics["baseline_perplexity"]["fox"], rel=0.2)
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape == (1, 5)


def test_several_formats_make_one_plan(overrides: Callable[..., list[str]]) -> None:
    more = ["format=mixed", "metric=output", "allocator=measured", "allocator.bits=[2,3,4,8]", "allocator.rounds=1"]
    more += ["allocator.plans=3", "allocator.count=storage", "allocator.budget=3.6", "audit=2"]
    run = aptq.quantize(overrides(*more, f"{MIXED[1]}.group_size=64"))  # as large as integers, then
    metrics, plan = run.metrics(), run.plan()
    assert plan is not None
    assert metrics["bits"]["storage"] <= 3.6
    assert {option.format for option in plan.layers.values()} == {"integer", "asymmetric_float"}
    offered = {(option.bits, option.format) for option in run.sensitivity()["model.layers.0.mlp.up_proj"]}
    assert offered == {(b, f) for b in (2, 3, 4, 8) for f in ("integer", "asymmetric_float") if (b, f[0]) != (8, "a")}
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    for name, option in plan.layers.items():
        layer = model.get_submodule(name)
        assert (layer.option, layer.format_name) == (option, option.format)
    # The same plan, given: the same model. Formats that the config has not are refused.
    given = f"plan={run.folder / 'plan.json'}"
    again = aptq.quantize(overrides("evaluator=none", "format=mixed", given, folder="given"))
    files = [each.folder / "model" / "model.safetensors" for each in (run, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(AptqError, match="is for format asymmetric_float, the config says integer; .* format=mixed"):
        aptq.quantize(overrides("evaluator=none", given, folder="other"))


def test_weights_and_activations_in_four_bits(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    """Pass 2, the check of what was written, the checkpoint's config, a reload, and another export."""
    from aptq.experiment import evaluate, export

    words = ["format=block_clustered", "allocator=uniform", "allocator.bits=4", "model.quantize_head=true"]
    run = aptq.quantize(overrides(*words, "activation=block_clustered", "activation.group_size=32", family="gpt2"))
    metrics = run.metrics()
    assert metrics["perplexity"]["fox"] == pytest.approx(metrics["baseline_perplexity"]["fox"], rel=0.25)
    stored = json.loads((run.folder / "model" / "config.json").read_text())["quantization_config"]
    assert stored["activation"]["name"] == "block_clustered"
    assert stored["activation"]["group_size"] == 32
    data = [each for each in overrides() if each.startswith(("data", "evaluator", "fabric", "callback"))]
    found = evaluate([f"model.path={run.folder / 'model'}", *data])
    assert found["perplexity"]["fox"] == pytest.approx(metrics["perplexity"]["fox"], rel=1e-6)
    export([f"run={run.folder}", f"output={tmp_path / 'again'}"])
    again = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert again["activation"] == stored["activation"]
    with pytest.raises(AptqError, match="exporter=compressed_tensors cannot store how"):
        export([f"run={run.folder}", f"output={tmp_path / 'other'}", "exporter=compressed_tensors"])
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape == (1, 5)


@pytest.mark.parametrize(
    "format", ["integer", "vector format.iterations=2 format.refits=0 format.beam=2", "outliers", "group_bits"]
)
def test_weights_in_another_basis(format: str, overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    """Scores, plan, audit, pass 2, the check of what was written, a reload, and another export."""
    from aptq.experiment import evaluate, export

    words = ["transform=hadamard", "allocator=knapsack", "allocator.bits=[3,4]", "allocator.budget=3.5", "audit=2"]
    run = aptq.quantize(overrides(*words, "metric=output", *f"format={format}".split()))
    metrics = run.metrics()
    assert metrics["perplexity"]["fox"] == pytest.approx(metrics["baseline_perplexity"]["fox"], rel=0.25)
    assert 0.2 < metrics["audit"]["slope"] < 5
    stored = json.loads((run.folder / "model" / "config.json").read_text())["quantization_config"]
    assert stored["transform"] == {"name": "hadamard", "seed": 0}
    data = [each for each in overrides() if each.startswith(("data", "evaluator", "fabric", "callback"))]
    found = evaluate([f"model.path={run.folder / 'model'}", *data])
    assert found["perplexity"]["fox"] == pytest.approx(metrics["perplexity"]["fox"], rel=1e-6)
    export([f"run={run.folder}", f"output={tmp_path / 'again'}"])
    again = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert again["transform"] == stored["transform"]
    with pytest.raises(AptqError, match="exporter=compressed_tensors cannot store that"):
        export([f"run={run.folder}", f"output={tmp_path / 'other'}", "exporter=compressed_tensors"])


def test_inputs_quantized_in_another_basis(overrides: Callable[..., list[str]]) -> None:
    words = ["transform=hadamard", "activation=int8", "allocator=uniform", "allocator.bits=4"]
    metrics = aptq.quantize(overrides(*words)).metrics()
    assert metrics["perplexity"]["fox"] == pytest.approx(metrics["baseline_perplexity"]["fox"], rel=0.25)


def test_inputs_are_rotated_by_default_where_the_exporter_can_say_so(overrides: Callable[..., list[str]]) -> None:
    words = ["evaluator=none", "allocator=uniform", "allocator.bits=4"]
    sections = []
    for folder, more in (("first", []), ("second", ["exporter=compressed_tensors", "format.symmetric=true"])):
        run = aptq.quantize(overrides(*words, *more, folder=folder))
        sections.append(read_config(run.folder)["transform"])
    assert sections == [{"name": "hadamard", "seed": 0}, {}]


def test_all_budgets_at_once(overrides: Callable[..., list[str]]) -> None:
    words = ["evaluator=none", "allocator=pareto", "allocator.bits=[2,3,4]", "allocator.budget=3", "allocator.step=0.5"]
    run = aptq.quantize(overrides(*words, folder="first"))
    plans = {path.stem: read_plan(path) for path in (run.folder / "plans").iterdir()}
    assert sorted(plans) == ["2", "2.5", "3", "3.5", "4"]
    made = read_plan(run.folder / "plan.json")
    assert plans["3"].layers == made.layers
    assert plans["3"].predicted_cost == made.predicted_cost
    again = aptq.quantize(overrides("evaluator=none", f"plan={run.folder / 'plans' / '2.5.json'}", folder="second"))
    assert read_plan(again.folder / "plan.json").layers == plans["2.5"].layers
    aptq.quantize(overrides("evaluator=none", "overwrite=true", folder="first"))
    assert not (run.folder / "plans").exists()


def test_a_checkpoint_says_nothing_of_inputs_that_are_left_alone(overrides: Callable[..., list[str]]) -> None:
    run = aptq.quantize(overrides("evaluator=none", "transform=none"))
    stored = json.loads((run.folder / "model" / "config.json").read_text())["quantization_config"]
    assert not {"activation", "transform"} & stored.keys()


def test_another_transform_is_measured_anew(overrides: Callable[..., list[str]]) -> None:
    words = ["evaluator=none", "metric=error", "allocator=knapsack", "allocator.bits=[2,3,4]"]
    plain = aptq.quantize(overrides(*words, "transform=none", folder="first"))
    turned = aptq.quantize(overrides(*words, "transform=hadamard", folder="second"))
    assert plain.sensitivity() != turned.sensitivity()


def test_a_budget_sweep_measures_once(overrides: Callable[..., list[str]]) -> None:
    aptq.quantize(overrides("evaluator=none", folder="first"))
    run = aptq.quantize(overrides("evaluator=none", "allocator.ratio=0.25", folder="second"))
    first = aptq.Run.read(run.folder.parent / "first").metrics()["seconds"]
    assert run.metrics()["seconds"]["measure"] < 0.5 * first["measure"] + 0.05


def test_a_plan_by_the_loss_is_audited_and_on_record(overrides: Callable[..., list[str]]) -> None:
    more = ["metric=output", "allocator=knapsack", "allocator.bits=[2,3,4]", "allocator.budget=3.3", "audit=4"]
    run = aptq.quantize(overrides(*more))
    metrics, plan = run.metrics(), run.plan()
    assert plan is not None
    assert 3.2 < metrics["bits"]["code"] <= 3.3
    found = run.sensitivity()
    assert found.keys() == plan.layers.keys()
    assert plan.predicted_cost == pytest.approx(sum(found[name][option][1] for name, option in plan.layers.items()))
    for options in found.values():
        assert [option.bits for option in options] == [2, 3, 4]
        (_, worst), _, (_, best) = options.values()
        assert 0 < best < worst
    audit = metrics["audit"]
    assert [row["kind"] for row in audit["plans"]] == ["chosen", "uniform", *["random"] * 4]
    assert audit["spearman"] > 0.5
    assert 0.2 < audit["slope"] < 5
    assert {"measure", "gradients", "audit"} <= metrics["seconds"].keys()
    assert not list(Path(run.config["cache_dir"]).rglob("*.safetensors")), "roundings and activations are gone"
    again = aptq.quantize(overrides(*more[:-2], "allocator.budget=3.6", "evaluator=none", folder="again"))
    assert not {"measure", "gradients"} & again.metrics()["seconds"].keys(), "another budget measures nothing"


def test_each_layer_alone_and_then_the_plans_themselves_are_measured(overrides: Callable[..., list[str]]) -> None:
    """The costs are those of single layers; the plan is the best of the measured ones; nothing is measured again."""
    plans = ["metric=divergence", "allocator=measured", "allocator.bits=[2,3,4]", "allocator.rounds=1"]
    more = [*plans, "allocator.plans=3", "allocator.budget=3", "evaluator=none", "audit=2"]
    run = aptq.quantize(overrides(*more))
    plan, found = run.plan(), run.sensitivity()
    assert plan is not None
    assert run.metrics()["bits"]["code"] <= 3
    assert {"measure", "divergence", "search", "audit"} <= run.metrics()["seconds"].keys()
    for options in found.values():
        (_, worst), _, (_, best) = options.values()
        assert 0 < best < worst
    audit = run.metrics()["audit"]
    by_kind = {row["kind"]: row for row in audit["plans"]}
    assert audit["spearman"] > 0
    assert by_kind["chosen"]["measured"] <= by_kind["uniform"]["measured"]
    again = aptq.quantize(overrides(*more[:-1], "allocator.budget=2.5", folder="again"))
    assert not {"divergence"} & again.metrics()["seconds"].keys(), "another budget measures no layer"


def test_fused_layers_share_an_option_and_are_measured_together(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    more = ["fused=true", "evaluator=none", "allocator=knapsack", "allocator.bits=[2,4]", "allocator.budget=2.9"]
    run = aptq.quantize(overrides(*more, "metric=divergence"))
    plan, costs = run.plan(), run.sensitivity()
    assert plan is not None
    assert {name.rpartition(".")[2] for group in plan.fused_groups for name in group} == {
        *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    }
    for group in plan.fused_groups:
        assert len({plan.layers[name] for name in group}) == 1
    for group in plan.fused_groups:
        if len(group) == 2:  # gate and up: of one size, and so with one half of the cost each
            one, other = (list(costs[name].values()) for name in group)
            assert one == other
    path = tmp_path / "edited.json"
    edited = json.loads((run.folder / "plan.json").read_text())
    edited["layers"][plan.fused_groups[0][0]]["bits"] = 3
    edited["fused_groups"] = []
    path.write_text(json.dumps(edited))
    with pytest.raises(AptqError, match="splits a fused group"):
        aptq.quantize(overrides("evaluator=none", f"plan={path}", "fused=true", folder="given"))
    assert aptq.quantize(overrides("evaluator=none", f"plan={path}", folder="given")).plan() is not None


def test_group_sizes_are_chosen_too(overrides: Callable[..., list[str]]) -> None:
    more = ["allocator=knapsack", "allocator.bits=[2,3,4]", "allocator.group_sizes=[32,64]", "allocator.count=storage"]
    run = aptq.quantize(overrides(*more, "allocator.budget=3.9"))
    plan = run.plan()
    assert plan is not None
    assert {option.group_size for option in plan.layers.values()} == {32, 64}
    assert 3.8 < run.metrics()["bits"]["storage"] <= 3.9
    assert all(len(options) == 6 for options in run.sensitivity().values())
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape == (1, 5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["audit=4", "allocator=uniform"], "allocator=uniform predicts nothing"),
        (["audit=1"], "from 2 up"),
        (["metric=output", "measure_bits=4"], "goes by the full-precision model"),
    ],
)
def test_plans_that_cannot_be_made_are_refused(
    more: list[str], message: str, overrides: Callable[..., list[str]]
) -> None:
    with pytest.raises(AptqError, match=message):
        aptq.quantize(overrides(*more))


def test_statistics_are_cached_by_the_rounded_blocks_they_were_measured_behind(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    """In full precision, behind 4 bits, behind 4 bits of another quantizer; then the second once more, and refined."""
    again = ["allocator.ratio=0.3"], ["quantizer.refine=2"]
    walks = ([], *(["measure_bits=4", *more] for more in ([], ["quantizer=nearest"], *again)))
    traces, cached = [], []
    for number, more in enumerate(walks):
        run = aptq.quantize(overrides("evaluator=none", "metric=trace", *more, folder=str(number)))
        traces.append({report.name: report.predicted_cost * 4.0**report.bits for report in run.layers()})
        cached.append(len(list((tmp_path / "cache" / "statistics").iterdir())))
    assert cached == [1, 2, 3, 3, 3]
    assert traces[1] == traces[3] == traces[4]
    for name in traces[0]:
        assert len({each[name] for each in traces}) == (1 if ".layers.0." in name else 3)


@pytest.mark.parametrize("share", [100, 90, 80, 75, 70, 60, 50, 40])
def test_the_papers_experiments_spend_the_bits_that_they_name(share: int, overrides: Callable[..., list[str]]) -> None:
    """Never more, and less only where no layer of 2 bits fits into what is left: one of a fifteenth of the weights."""
    run = aptq.quantize(overrides("evaluator=none", f"experiment=aptq_{share}", "format.group_size=128"))
    named = 2 + 2 * share / 100
    assert named - 2 / 15 < run.metrics()["bits"]["code"] <= named
    assert {report.group_size for report in run.layers()} == {128}, "wider than the layers: one group a row"
    assert all((report.predicted_cost is None) == (share == 100) for report in run.layers())


@pytest.mark.parametrize("keep", ["first", "last", "alternating"])
@pytest.mark.parametrize(("share", "blocks"), [(75, 2), (50, 1)])
def test_the_manual_baseline_spends_whole_blocks(
    share: int, blocks: int, keep: str, overrides: Callable[..., list[str]]
) -> None:
    more = ("evaluator=none", f"experiment=manual_blockwise_{share}", f"allocator.keep={keep}")
    run = aptq.quantize(overrides(*more))
    assert run.metrics()["bits"]["code"] == pytest.approx(2 + 2 * blocks / 3)
    assert "measure" not in run.metrics()["seconds"]


def test_evaluate_judges_what_quantize_wrote(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    from aptq.experiment import evaluate

    run = aptq.quantize(overrides("allocator=uniform", "allocator.bits=8"))
    data = [each for each in overrides() if each.startswith(("data", "evaluator", "fabric", "callback"))]
    output = tmp_path / "new" / "scores.json"
    words = [f"model.path={run.folder / 'model'}", *data, f"output={output}"]
    found = evaluate(words)
    assert found["perplexity"]["fox"] == pytest.approx(run.metrics()["perplexity"]["fox"], rel=1e-6)
    written = json.loads(output.read_text())
    assert written["perplexity"] == found["perplexity"]
    assert written["backends"] == run.metrics()["backends"]
    assert written["config"]["model"]["path"] == str(run.folder / "model")
    with pytest.raises(AptqError, match="exists already"):
        evaluate(words)


def test_export_writes_a_finished_model_again(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    from aptq.experiment import export

    run = aptq.quantize(overrides("evaluator=none"))
    folder = export([f"run={run.folder}", f"output={tmp_path / 'again'}"])
    again = load_file(folder / "model.safetensors")
    assert again.keys() == _tensors(run.folder).keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in _tensors(run.folder).items())
    with pytest.raises(AptqError, match="exists already"):
        export([f"run={run.folder}", f"output={tmp_path / 'again'}"])


def _run_on_two_ranks(overrides: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aptq", *overrides, "fabric=two_ranks"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "estimator", [["hessian=loss"], ["hessian=attention", "hessian.mlp=true", "hessian.tokens=loss"]]
)
def test_gradients_are_taken_once_and_serve_both_passes(
    estimator: list[str], overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    plan = ["evaluator=none", *estimator]
    first = aptq.quantize(overrides(*plan, folder="first"))
    (folder,) = (tmp_path / "cache" / "gradients").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert before, "mean squares of gradients, one file a block"
    assert all(report.trace > 0 for report in first.layers())
    again = aptq.quantize(overrides(*plan, folder="again"))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    one, two = _tensors(first.folder), _tensors(again.folder)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.distributed
@pytest.mark.parametrize("quantizer", ["gptq", "gptaq"])
def test_two_ranks_agree_with_one(quantizer: str, overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    # Drift is small, so that a few other codes before a layer move its target; the first block has none before it.
    compared = "" if quantizer == "gptq" else "layers.0.self_attn"
    # In the activation order, two columns of nearly equal curvature may change places and all codes after them differ.
    plan = ["evaluator=none", "allocator=uniform", "allocator.bits=4"]
    plan += [f"quantizer={quantizer}", "quantizer.act_order=false"]
    aptq.quantize(overrides(*plan, folder="one"))
    _run_on_two_ranks(overrides(*plan, folder="two"))
    one, two = _tensors(tmp_path / "one"), _tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    names = [name for name in one if name.endswith("qweight") and compared in name]
    shares = [_share_of_other_codes(one[name], two[name]) for name in names]
    assert max(shares) < 0.05, "more codes differ than the order of float32 sums explains"
    assert sum(shares) / len(shares) < 0.02


@pytest.mark.distributed
def test_two_ranks_measure_behind_the_same_rounded_blocks(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    # Nearest rounding: see above; each rank rounds the layers that it owns, and the traces are sums over both.
    plan = ["evaluator=none", "metric=trace", "measure_bits=2", "quantizer=nearest"]
    aptq.quantize(overrides(*plan, folder="one"))
    _run_on_two_ranks(overrides(*plan, f"cache_dir={tmp_path / 'other'}"))
    one, two = (
        {report.name: report.predicted_cost for report in aptq.Run.read(tmp_path / folder).layers()}
        for folder in ("one", "run")
    )
    assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.distributed
def test_two_ranks_predict_and_measure_the_same_divergence(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    search = ["allocator=measured", "allocator.rounds=1", "allocator.plans=2", "allocator.samples=3"]
    plan = ["evaluator=none", "metric=output", "metric.samples=3", *search, "quantizer=nearest", "audit=2"]
    aptq.quantize(overrides(*plan, folder="one"))
    _run_on_two_ranks(overrides(*plan, f"cache_dir={tmp_path / 'other'}"))
    one, two = (aptq.Run.read(tmp_path / folder) for folder in ("one", "run"))
    costs = [[cost for options in run.sensitivity().values() for _, cost in options.values()] for run in (one, two)]
    assert costs[0] == pytest.approx(costs[1], rel=1e-3)
    figures = [[row["measured"] for row in (run.audit() or {})["plans"]] for run in (one, two)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-2)


def _share_of_other_codes(one: torch.Tensor, two: torch.Tensor) -> float:
    width = one.shape[0] * 32
    return (unpack(one, 4, width) != unpack(two, 4, width)).double().mean().item()
