"""Configs compose from this package and from plug-ins, and what is wrong with them is said in one message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from aptq import config
from aptq.errors import AptqError
from aptq.registry import KINDS, available, build
from aptq.settings import ModelSettings, RunSettings


def test_the_primary_config_composes() -> None:
    composed = config.compose()
    assert composed.format.name == "integer"
    assert composed.run.dir.startswith("runs/")


@pytest.mark.parametrize("kind", KINDS)
def test_every_component_config_builds_what_it_names(kind: str) -> None:
    for name in config.config_files(kind):
        section = config.compose([f"{kind}={name}"])[kind]
        if not section or section.get("name") in (None, "auto", "none"):
            continue  # choices that name no component: backend=auto, logger=none
        assert section.name == name or name not in available(kind)  # others are a component's options under a name
        if kind != "logger":  # built with what only a run can give them
            assert build(kind, section) is not None


@pytest.mark.parametrize("name", sorted(path.stem for path in (config.CONF / "experiment").glob("*.yaml")))
def test_every_experiment_composes_and_its_components_build(name: str) -> None:
    composed = config.compose([f"experiment={name}"])
    assert composed.task == ("paper" if name.startswith("paper") else "quantize")
    for kind in ("hessian", "metric", "allocator", "format", "quantizer", "exporter", "evaluator"):
        assert kind not in composed or build(kind, composed[kind]) is not None


@pytest.mark.parametrize("share", [100, 90, 80, 75, 70, 60, 50, 40])
def test_the_papers_experiments_differ_in_their_ratio_only(share: int) -> None:
    composed, base = config.compose([f"experiment=aptq_{share}"]), config.compose(["experiment=aptq"])
    assert composed.allocator == {"name": "ratio", "ratio": share / 100, "high": 4, "low": 2}
    base.allocator.ratio = share / 100
    assert composed == base
    assert (composed.hessian.name, composed.metric.name, composed.quantizer.name) == ("attention", "trace", "gptq")
    assert (composed.measure_bits, composed.format.group_size, composed.format.clip_steps) == (4, 128, 0)
    assert (composed.data.num_samples, composed.data.sequence_length) == (128, 2048)


@pytest.mark.parametrize("share", [75, 50])
def test_the_manual_baseline_differs_from_the_papers_experiment_in_its_allocator_only(share: int) -> None:
    manual, ranked = (config.compose([f"experiment={name}_{share}"]) for name in ("manual_blockwise", "aptq"))
    assert manual.allocator == {"name": "blockwise", "ratio": share / 100, "high": 4, "low": 2, "keep": "first"}
    manual.allocator = ranked.allocator
    assert manual == ranked


def test_the_command_line_has_the_last_word_on_an_experiment() -> None:
    composed = config.compose(["experiment=aptq_75", "measure_bits=null", "allocator.ratio=0.65", "data=c4"])
    assert (composed.measure_bits, composed.allocator.ratio, composed.data.source) == (None, 0.65, "hub")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("quantizer=gptqq", r"Unknown quantizer 'gptqq'\. Did you mean 'gptq'\? Known: foem, gptaq, gptq, nearest"),
        ("data.num_sample=3", r"data.* has no key 'num_sample'\. Did you mean 'num_samples'\?"),
        (
            "quantizer.dampling=3",
            r"quantizer gptq has no key 'dampling'\. Did you mean 'damping'\? Its keys: name=gptq",
        ),
        ("quantizr=gptq", r"no section or option 'quantizr'\. Did you mean 'quantizer'\?"),
        ("dat.num_samples=3", r"no section or option 'dat'\. Did you mean 'data'\?"),
        ("data.num_samples=[1", r"Cannot read 'data.num_samples=\[1'"),
        ("data.seed", "Cannot read 'data.seed'.*key=value"),
        ("+quantizer=nearest", "quantizer is chosen twice"),
        ("data.num_samples.x=3", "data.num_samples is a single value"),
        ("quantizer=3", "set to a name"),
    ],
)
def test_bad_overrides_answer_in_one_message(override: str, told: str) -> None:
    with pytest.raises(AptqError, match=told) as raised:
        config.compose([override])
    assert "hydra" not in str(raised.value).lower()
    assert "\n" not in str(raised.value)


def test_an_unknown_primary_config_names_those_that_there_are() -> None:
    with pytest.raises(AptqError, match="no primary config 'quantise'.*quantize, evaluate"):
        config.compose(config_name="quantise")


def test_a_missing_value_is_named() -> None:
    section = OmegaConf.create({"model": {"path": "???"}}).model
    with pytest.raises(AptqError, match=r"model\.path has no value"):
        config.to_settings(ModelSettings, section, "model")


def test_settings_are_typed() -> None:
    section = OmegaConf.create({"path": "x", "skip": ["a"]})
    assert config.to_settings(ModelSettings, section, "model") == ModelSettings(path="x", skip=["a"])
    assert config.to_settings(RunSettings, {"dir": "x"}, "run") == RunSettings(dir="x")


def test_settings_refuse_unknown_keys_and_bad_types() -> None:
    with pytest.raises(AptqError, match="model has no key 'pth'. Did you mean 'path'"):
        config.to_settings(ModelSettings, {"pth": "x"}, "model")
    with pytest.raises(AptqError, match="model: skip cannot be 'a'"):
        config.to_settings(ModelSettings, {"path": "x", "skip": "a"}, "model")
    with pytest.raises(AptqError, match="mapping"):
        config.to_settings(ModelSettings, "x", "model")  # type: ignore[arg-type]


def test_other_errors_are_not_explained() -> None:
    assert config.explain_hydra_error(RuntimeError("bug")) is None
    assert config.explain_hydra_error(ValueError("bug")) is None


def test_the_run_id_stays_the_same_within_a_process() -> None:
    assert config.run_id() == config.run_id()
    assert config.compose().run.dir == config.compose().run.dir


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TORCHELASTIC_RUN_ID": "abc", "SLURM_JOB_ID": "7"}, "abc"),
        ({"SLURM_JOB_ID": "7"}, "7"),
        ({"TORCHELASTIC_RUN_ID": "none", "SLURM_JOB_ID": "7"}, "7"),
    ],
)
def test_the_run_id_is_the_launchers(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert config.run_id.__wrapped__() == expected


def test_processes_of_one_unnamed_torchrun_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    here = config.run_id.__wrapped__()
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert config.run_id.__wrapped__() == here


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a plug-in whose code cannot be imported and whose config can be chosen all the same."""
    info = tmp_path / "confbringer-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: confbringer\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[aptq.conf]\nbringer = confbringer.conf\nliar = confbringer.nothing\n")
    folder = tmp_path / "confbringer" / "conf" / "format"
    folder.mkdir(parents=True)
    (tmp_path / "confbringer" / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "brought.yaml").write_text("name: brought\nwidth: 3\n")
    (folder / "integer.yaml").write_text("name: shadowed\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_configs_of_plug_ins_are_found_without_importing_them(plugin: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert config.compose(["format=brought"]).format.width == 3
    assert config.config_files("format")["brought"].is_relative_to(plugin)
    assert "confbringer" not in sys.modules
    assert "'liar' promises configs" in caplog.text


def test_plug_ins_add_names_and_replace_none(plugin: Path) -> None:
    assert config.compose(["format=integer"]).format.name == "integer"
    assert config.config_files("format")["integer"].is_relative_to(config.CONF)


def test_importing_the_package_imports_neither_hydra_nor_torch() -> None:
    code = "import aptq, sys; print(sorted({'hydra', 'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
