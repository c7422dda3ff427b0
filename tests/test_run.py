"""The run folder: what is written reads back, killed runs go on, and nothing of anybody's is lost."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aptq.api import LayerReport, Option
from aptq.errors import AptqError
from aptq.plan import Plan
from aptq.run import Run
from aptq.settings import RunSettings
from tests.test_metrics_schema import METRICS

CONFIG: dict[str, Any] = {
    "name": "demo",
    "model": {"path": "tiny", "skip": []},
    "format": {"name": "integer", "group_size": 64},
    "fabric": {"devices": 1, "precision": None},
    "evaluator": {"name": "perplexity", "window": 512},
    "run": {"dir": "a"},
    "logger": {"name": "csv"},
}


def settings(folder: Path, overwrite: bool = False) -> RunSettings:
    return RunSettings(dir=str(folder), overwrite=overwrite)


def report(name: str, **changes: Any) -> LayerReport:
    values: dict[str, Any] = {
        "name": name, "out_features": 8, "in_features": 4, "bits": 3, "group_size": -1, "format": "integer",
        "storage_bits": 3.1,
        "tokens": 9, "trace": 0.1, "predicted_cost": None, "error_nearest": 0.3, "error": 0.2, "relative_error": 1e-3,
        "damping": 0.01, "seconds": 0.5, "events": 'damping raised to 0.1, "twice"',
    }  # fmt: skip
    return LayerReport(**(values | changes))


def block(index: int) -> tuple[dict[str, torch.Tensor], list[LayerReport]]:
    names = [f"model.layers.{index}.mlp", f"model.layers.{index}.mlp.up_proj"]
    tensors = {f"{name}.{part}": torch.full((3,), index) for name in names for part in ("codes", "scales")}
    return tensors, [report(name) for name in names]


def finish(run: Run) -> None:
    run.model_folder.mkdir()
    (run.model_folder / "config.json").write_text("{}")
    run.write_metrics(METRICS)
    run.finish()


def test_a_new_run_records_its_config(tmp_path: Path) -> None:
    with Run.open(settings(tmp_path / "runs" / "x"), CONFIG | {"path": Path("a"), "pair": (1, 2)}) as run:
        assert not run.resumed
        assert not run.finished
    read = Run.read(tmp_path / "runs" / "x")
    assert read.config == CONFIG | {"path": "a", "pair": [1, 2]}


def test_results_read_back(tmp_path: Path) -> None:
    plan = Plan(layers={"a": Option(3, 64, "integer")})
    rows = [report("a", predicted_cost=0.1 + 0.2), report("b", relative_error=float("inf"))]
    with Run.open(settings(tmp_path / "x"), CONFIG) as run:
        assert run.plan() is None
        assert run.layers() == []
        run.save_plan(plan)
        run.write_layers_csv(rows)
        finish(run)
    read = Run.read(tmp_path / "x")
    assert read.finished
    assert read.plan() == plan
    assert read.layers() == rows
    assert read.metrics() == METRICS


def test_finished_blocks_come_back_when_a_run_is_taken_up(tmp_path: Path) -> None:
    with Run.open(settings(tmp_path), CONFIG) as run:
        run.save_block(0, *block(0))
        run.save_block(1, *block(1))
    with Run.open(settings(tmp_path), CONFIG) as run:
        assert run.resumed
        assert [run.block_done(index) for index in range(3)] == [True, True, False]
        tensors, reports = run.load_block(1)
        wanted, wanted_reports = block(1)
        assert reports == wanted_reports
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def test_one_layer_is_read_from_its_block(tmp_path: Path) -> None:
    with Run.open(settings(tmp_path), CONFIG) as run:
        run.save_block(0, *block(0))
        run.save_block(7, *block(7))
        packed = run.packed("model.layers.7.mlp")  # not the layer whose name begins with this one
        assert packed.keys() == {"codes", "scales"}
        assert packed["codes"].tolist() == [7, 7, 7]
        with pytest.raises(AptqError, match="holds layer 'model.layers.9'"):
            run.packed("model.layers.9")


@pytest.mark.parametrize("damage", ["truncate", "flip", "tensors gone", "record cut", "record gone"])
def test_a_damaged_block_is_done_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    with Run.open(settings(tmp_path), CONFIG) as run:
        run.save_block(0, *block(0))
    file, record = tmp_path / "blocks" / "00000.safetensors", tmp_path / "blocks" / "00000.json"
    data = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(data[:-5])
    elif damage == "flip":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "tensors gone":
        file.unlink()
    elif damage == "record cut":
        record.write_text(record.read_text()[:-40])
    else:
        record.unlink()
    with Run.open(settings(tmp_path), CONFIG) as run, caplog.at_level(logging.WARNING):
        assert not run.block_done(0)
        assert ("block 0 is damaged" in caplog.text) == (damage != "record gone")
        with pytest.raises(AptqError, match="not finished"):
            run.load_block(0)
        run.save_block(0, *block(0))
        assert run.block_done(0)


def test_a_killed_process_leaves_blocks_to_go_on_from(tmp_path: Path) -> None:
    code = (
        "import os, sys, torch; from aptq.run import Run; from aptq.settings import RunSettings\n"
        "run = Run.open(RunSettings(dir=sys.argv[1]), {'seed': 0})\n"
        "run.save_block(0, {'a.codes': torch.ones(2)}, [])\n"
        "(run.folder / 'blocks' / '.tmp-00001.safetensors-ab').write_bytes(b'half')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")]).returncode == -9
    with Run.open(settings(tmp_path / "x"), {"seed": 0}) as run:
        assert run.resumed
        assert run.block_done(0)
        assert not run.block_done(1)
    assert sorted(path.name for path in (tmp_path / "x" / "blocks").iterdir()) == ["00000.json", "00000.safetensors"]


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with Run.open(settings(tmp_path), CONFIG):
        with pytest.raises(AptqError, match=r"Process \d+ on .* is at work in the run folder"):
            Run.open(settings(tmp_path), CONFIG)
        with pytest.raises(AptqError, match="at work"):
            Run.open(settings(tmp_path, overwrite=True), CONFIG)
    Run.open(settings(tmp_path), CONFIG).close()


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    with Run.open(settings(tmp_path), CONFIG) as run:
        run.save_block(0, *block(0))
        finish(run)
    assert not (tmp_path / "blocks").exists()
    with pytest.raises(AptqError, match=r"is finished\..*overwrite=true.*name="):
        Run.open(settings(tmp_path), CONFIG)


def test_blocks_are_kept_on_demand_and_never_removed_before_the_results_are_there(tmp_path: Path) -> None:
    with Run.open(settings(tmp_path), CONFIG) as run:
        run.save_block(0, *block(0))
        with pytest.raises(RuntimeError, match="before"):
            run.finish()
        run.model_folder.mkdir()
        run.write_metrics(METRICS)
        run.finish(keep_blocks=True)
    assert Run.read(tmp_path).packed("model.layers.0.mlp")["codes"].tolist() == [0, 0, 0]


def test_another_config_is_refused_key_by_key(tmp_path: Path) -> None:
    Run.open(settings(tmp_path), CONFIG).close()
    before = (tmp_path / "config.yaml").read_text()
    other = CONFIG | {"format": {"name": "integer", "group_size": 32, "symmetric": True}, "seed": 1}
    del other["model"]
    with pytest.raises(AptqError) as raised:
        Run.open(settings(tmp_path), other)
    for told in (
        "format.group_size: 64 -> 32",
        "format.symmetric: None -> True",
        "seed: None -> 1",
        "model.path: 'tiny' -> None",
        "overwrite=true",
    ):
        assert told in str(raised.value)
    assert (tmp_path / "config.yaml").read_text() == before


def test_keys_that_cannot_change_the_blocks_may_change(tmp_path: Path) -> None:
    Run.open(settings(tmp_path), CONFIG).close()
    other = CONFIG | {"logger": {}, "run": {"dir": "b"}, "fabric": {"devices": 2, "precision": None}, "name": "y"}
    with Run.open(settings(tmp_path), other) as run:
        assert run.resumed
    assert Run.read(tmp_path).config == CONFIG
    other = CONFIG | {"evaluator": {"name": "perplexity", "window": 128}}
    with Run.open(settings(tmp_path), other) as run:
        assert run.resumed
    assert Run.read(tmp_path).config == other  # what the figures will come from


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    (tmp_path / "model").mkdir()
    for overwrite in (False, True):
        with pytest.raises(AptqError, match=r"holds no run of aptq \(it has config\.yaml, model\)"):
            Run.open(settings(tmp_path, overwrite), CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "model"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(AptqError, match="is a file"):
        Run.open(settings(tmp_path / "file"), CONFIG)


def test_overwriting_clears_the_run_and_nothing_else(tmp_path: Path) -> None:
    with Run.open(settings(tmp_path), CONFIG) as run:
        run.save_block(0, *block(0))
        run.write_layers_csv([])
        finish(run)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "log.txt").write_text("this process has it open")
    with Run.open(settings(tmp_path, overwrite=True), CONFIG | {"seed": 3}) as run:
        assert not run.resumed
        assert not run.finished
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.yaml", "log.txt", "notes.txt"]
    assert Run.read(tmp_path).config["seed"] == 3


def test_only_rank_0_writes(tmp_path: Path) -> None:
    with Run.open(settings(tmp_path), CONFIG) as run, Run.open(settings(tmp_path), CONFIG, rank=1) as other:
        other.save_block(0, *block(0))
        other.save_plan(Plan(layers={"a": Option(3, 64, "integer")}))
        other.write_layers_csv([])
        other.write_metrics(METRICS)
        other.finish()
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.yaml"]
        run.save_block(0, *block(0))
        assert other.block_done(0)


def test_a_run_that_is_only_read_is_not_written(tmp_path: Path) -> None:
    Run.open(settings(tmp_path), CONFIG).close()
    with pytest.raises(RuntimeError, match="opened to read"):
        Run.read(tmp_path).write_metrics(METRICS)
    with pytest.raises(AptqError, match="not finished"):
        Run.read(tmp_path).metrics()
    with pytest.raises(AptqError, match="no run folder"):
        Run.read(tmp_path / "missing")


def test_figures_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with Run.open(settings(tmp_path), CONFIG) as run:
        run.write_metrics(METRICS | {"perplexity": {"c4": float("inf"), "wikitext2": float("nan")}})
        assert json.loads((tmp_path / "metrics.json").read_text())["perplexity"] == {"c4": None, "wikitext2": None}
        assert run.metrics()["perplexity"] == {"c4": None, "wikitext2": None}
