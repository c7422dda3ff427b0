"""Loggers write into the run folder, go on after a resume, and end as the run ended."""

import csv
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aptq.api import LayerReport
from aptq.callbacks import Callbacks
from aptq.errors import AptqError
from aptq.loggers import csv_logger, wandb_logger
from aptq.plan import Plan
from aptq.run import Run
from aptq.settings import RunSettings
from aptq.testing.allocation import random_problem
from aptq.tracking import LoggerCallback

METRICS = {
    "perplexity": {"c4": 40.5, "wikitext2": None},
    "bits": {"code": 3.5, "storage": 3.8},
    "seconds": {"quantize": 2.0},
    "peak_rss_bytes": 1000,
    "versions": {"aptq": "0.1.0"},
}


def report(error: float) -> LayerReport:
    return LayerReport(
        name="a", out_features=8, in_features=4, bits=3, group_size=-1, format="integer",
        storage_bits=3.1, tokens=9, trace=0.1,
        predicted_cost=None, error_nearest=0.3, error=0.2, relative_error=error, damping=0.0, seconds=0.5, events="",
    )  # fmt: skip


def play(logger: Any, folder: Path) -> None:
    with Callbacks([LoggerCallback([logger])]) as callbacks:
        callbacks.on_run_start(folder=folder, config={"model": {"path": "tiny"}, "seed": 0})
        for index in range(2):
            callbacks.on_block_end(stage="measure", index=index, metrics={"trace": 0.5 + index})
        callbacks.on_stage_end(stage="measure", seconds=1.0)
        for index in range(2):
            callbacks.on_layer_end(stage="quantize", report=report(0.1))
            callbacks.on_layer_end(stage="quantize", report=report(0.3))
            callbacks.on_block_end(stage="quantize", index=index, metrics={"error": 0.2})
        callbacks.on_run_end(folder=folder, metrics=METRICS)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def test_csv_holds_the_figures_of_blocks_and_the_final_ones(tmp_path: Path) -> None:
    play(csv_logger(save_dir=tmp_path), tmp_path)
    assert rows(tmp_path / "csv" / "version_0" / "metrics.csv") == [
        {"measure/trace": "0.5", "step": "0"},
        {"measure/trace": "1.5", "step": "1"},
        {"seconds/measure": "1.0", "step": "1"},
        {"quantize/error": "0.2", "quantize/relative_error": "0.2", "step": "0"},
        {"quantize/error": "0.2", "quantize/relative_error": "0.2", "step": "1"},
        {"perplexity/c4": "40.5", "bits/code": "3.5", "bits/storage": "3.8", "peak_rss_bytes": "1000.0", "step": "2"},
    ]
    assert "tiny" in (tmp_path / "csv" / "version_0" / "hparams.yaml").read_text()


def test_a_resumed_run_keeps_the_figures_of_the_first(tmp_path: Path) -> None:
    play(csv_logger(save_dir=tmp_path), tmp_path)
    play(csv_logger(save_dir=tmp_path), tmp_path)
    first, second = (rows(tmp_path / "csv" / f"version_{version}" / "metrics.csv") for version in range(2))
    assert len(first) == len(second) == 6


def test_figures_are_on_disk_when_a_run_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with Callbacks([LoggerCallback([csv_logger(save_dir=tmp_path)])]) as callbacks:
            callbacks.on_block_end(stage="quantize", index=0, metrics={"error": 0.2})
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert rows(tmp_path / "csv" / "version_0" / "metrics.csv") == [{"quantize/error": "0.2", "step": "0"}]


def finished_run(folder: Path) -> None:
    """Leave what ``LoggerCallback`` finds at the end of a run."""
    problem = random_problem((2, 4), 3, 0, flat=False, with_costs=True)
    layers = {name: problem.options[at % 2] for at, name in enumerate(problem.shapes)}
    samples = [{"prompt": "Once", "original": " upon", "quantized": " under"}]
    metrics = {**METRICS, "baseline_perplexity": {}, "bytes": {"model": 1, "original": 4}, "peak_device_bytes": None}
    with Run.open(RunSettings(dir=str(folder)), {"model": {"path": "tiny"}, "seed": 0}) as run:
        run.save_plan(Plan(layers=layers))
        run.save_sensitivity(problem)
        run.write_layers_csv([replace(report(0.1), name=name) for name in layers])
        run.model_folder.mkdir()
        run.write_metrics({**metrics, "samples": samples})
        run.finish()


def records(path: Path) -> Iterator[Any]:
    """Read a .wandb file: LevelDB's log format with a header of 7 bytes, a protocol buffer a record."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no record begins in the last bytes of a block
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def test_wandb_writes_all_of_a_run_offline_into_its_folder_and_keeps_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    for folder in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(folder, str(tmp_path / folder))
    run_folder = tmp_path / "run"
    finished_run(run_folder)
    play(wandb_logger(save_dir=run_folder, project="tests", offline=True, tags=["tiny"]), run_folder)
    assert wandb.run is None  # finished
    wandb.teardown()  # as at the end of a process: its service has written all
    identity = (run_folder / "wandb" / "run-id.txt").read_text()
    (stored,) = run_folder.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb")
    logged: dict[str, Any] = {}
    kept: set[str] = set()
    for record in records(stored):
        for item in record.history.item:
            logged["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        kept.update(entry.path for entry in record.request.log_artifact.artifact.manifest.contents)
        kept.update(entry.path for entry in record.artifact.manifest.contents)
    assert logged["quantize/relative_error"] == pytest.approx(0.2)
    assert logged["perplexity/c4"] == 40.5
    shown = {
        key.removesuffix("/path"): stored.parent / "files" / value for key, value in logged.items() if "/path" in key
    }
    pictures = {f"report/{path.stem}" for path in run_folder.glob("*.png")}
    assert {"report/bits", "report/trade_off"} < pictures
    assert pictures | {"report/page", "tables/layers", "tables/sensitivity", "tables/continuations"} <= shown.keys()
    assert "Once" in shown["tables/continuations"].read_text()
    assert shown["report/page"].read_text() == (run_folder / "report.html").read_text()
    sensitivity = json.loads(shown["tables/sensitivity"].read_text())
    assert sensitivity["columns"] == ["layer", "bits", "group_size", "format", "stored_bits", "cost"]
    assert [isinstance(cell, str) for cell in sensitivity["data"][0]] == [True, *[False] * 5]  # no format was named
    files = {"plan.json", "config.yaml", "metrics.json", "layers.csv", "sensitivity.csv", "report.html"}
    assert files <= kept, "the artifact"
    again = wandb_logger(save_dir=str(run_folder), project="tests", offline=True)
    assert again.version == identity


def test_wandb_writes_nothing_before_there_is_something_to_log(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    wandb_logger(save_dir=tmp_path, offline=True).finalize("failed")
    assert list(tmp_path.iterdir()) == []


def test_wandb_refuses_options_that_it_has_not(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    with pytest.raises(AptqError, match=r"no key 'ofline'\. Did you mean 'offline'"):
        wandb_logger(save_dir=tmp_path, ofline=True)
