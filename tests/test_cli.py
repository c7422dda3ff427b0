"""The command line, as a user meets it."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aptq.config import compose

LIBRARIES = [
    "lightning.fabric",
    "transformers.models.llama.modeling_llama",
    "hydra",
    "matplotlib.pyplot",
    "rich.logging",
]
"""What takes most of the seconds that ``aptq`` needs to start."""

FORKED = str(Path(__file__).with_name("forked.py"))
Aptq = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def aptq_anew(tmp_path: Path) -> Aptq:
    """Return ``run(*arguments)``: ``aptq`` in an empty folder, as a user starts it."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "aptq", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=_environment(),
        )

    return run


@pytest.fixture
def aptq(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Aptq:
    """Return ``run(*arguments)``: the same, in a copy of a process that has imported libraries for all tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        output, errors = (tmp_path_factory.mktemp("told") / name for name in ("output", "errors"))
        given = (arguments, tmp_path, _environment(), output, errors)
        process = context.Process(target=runpy.run_path, args=(FORKED, {"given": given}))
        process.start()
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(arguments, process.exitcode, output.read_text(), errors.read_text())

    return run


def _environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "200"}


@pytest.fixture
def job(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> tuple[str, ...]:
    """Return the words that quantize a tiny model and judge it by ``tmp_path / "text.txt"``."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{number} bottles of beer on the wall" for number in range(99)))
    return (
        *(f"model.path={tiny_model_folder()}", "data=text", f"data.path={text}", f"data.evaluation_path={text}"),
        *("data.num_samples=2", "data.sequence_length=64", "evaluator.num_sequences=2"),
        *("fabric=cpu", f"cache_dir={tmp_path / 'cache'}"),
    )


def test_help_names_groups_and_keys(aptq_anew: Aptq) -> None:
    done = aptq_anew("--help")
    assert done.returncode == 0
    for part in ("quantizer: foem, gptaq, gptq, nearest", "num_samples", "aptq -cn evaluate"):
        assert part in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantizer=gptqq",), "Did you mean 'gptq'"),
        (("data=text", "data.path=missing.txt"), "missing.txt"),
        (("-cn", "quantise"), "quantize"),
        (("-cn", "report", "run=nowhere"), "nowhere"),
        (("task=evaluat",), "Unknown task 'evaluat'"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    arguments: tuple[str, ...], message: str, aptq: Aptq, tmp_path: Path
) -> None:
    done = aptq(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "nothing was begun, so nothing is left behind"


def test_a_sweep_leaves_one_run_each_and_prints_tables(aptq: Aptq, job: tuple[str, ...], tmp_path: Path) -> None:
    done = aptq(
        *("-m", *job, "name=sweep", "samples=1", "allocator=uniform", "allocator.bits=3,4"),
    )
    assert done.returncode == 0, done.stderr
    runs = sorted(path for path in (tmp_path / "runs" / "sweep").iterdir() if path.is_dir())
    assert len(runs) == 2
    for run in runs:
        assert {"model", "report.html", "metrics.json", "log.txt", "csv"} <= {path.name for path in run.iterdir()}
    assert done.stdout.count("perplexity on text") == 2
    page = tmp_path / "runs" / "sweep" / "comparison.html"
    before = page.read_text()
    assert "2 runs side by side" in before
    assert "allocator.bits" in before
    page.unlink()
    again = aptq("-cn", "report", f"run=[{runs[0]},{runs[1]}]", f"output={page.parent}")
    assert again.returncode == 0, again.stderr
    assert page.read_text() == before


@pytest.mark.parametrize("launcher", ["basic", pytest.param("joblib", marks=pytest.mark.slow)])
def test_a_sweep_goes_on_after_a_job_that_fails(
    launcher: str, aptq: Aptq, job: tuple[str, ...], tmp_path: Path
) -> None:
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = aptq(
        *("-m", f"hydra/launcher={launcher}", *job, "name=sweep", "samples=0"),
        *("allocator=knapsack", "metric=error", "allocator.budget=1.5,3,3.5"),
    )
    assert done.returncode == 2, "one job failed"
    runs = [path for path in (tmp_path / "runs" / "sweep").iterdir() if (path / "model").is_dir()]
    assert len(runs) == 2, "the others were done"
    assert (tmp_path / "runs" / "sweep" / "comparison.html").exists()
    told = done.stderr.splitlines()[-1]
    assert "A job of the sweep failed" in told
    assert "allocator.budget=1.5" in told
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_jobs_of_a_sweep_run_side_by_side_and_measure_once(aptq: Aptq, job: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = aptq(
        *("-m", "hydra/launcher=joblib", *job, "name=sweep", "samples=0", "allocator.budget=2.5,3,3.5"),
    )
    assert done.returncode == 0, done.stderr
    runs = [path for path in (tmp_path / "runs" / "sweep").iterdir() if path.is_dir()]
    assert sum("gradients" in json.loads((run / "metrics.json").read_text())["seconds"] for run in runs) == 1
    page = (tmp_path / "runs" / "sweep" / "comparison.html").read_text()
    assert len(runs) == 3
    assert all(run.name in page for run in runs)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_the_papers_tables_are_one_command_that_goes_on_where_it_stopped(
    aptq: Aptq, job: tuple[str, ...], tmp_path: Path
) -> None:
    rows = ("aptq_75", "aptq_50")
    left_out = [name for name in compose(["experiment=paper_smollm2"]).rows if name not in rows]
    text = tmp_path / "text.txt"
    command = (
        *("experiment=paper_smollm2", *job, f"data.evaluation_path={{c4: {text}, wikitext2: {text}}}", "name=paper"),
        *(f"~rows.{name}" for name in left_out),
    )
    done = aptq(*command)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "paper"
    assert {path.name for path in folder.iterdir()} == {*rows, "tables.md", "report.html", "figure2.png"}
    for row in rows:
        assert {"model", "plan.json", "report.html", "log.txt"} <= {path.name for path in (folder / row).iterdir()}
        assert "agrees" in (folder / row / "log.txt").read_text()
        assert "runs/paper/" not in (folder / row / "log.txt").read_text(), "that is of the next row"
    measured = [json.loads((folder / row / "metrics.json").read_text())["seconds"]["measure"] for row in rows]
    assert measured[1] < 0.1 * measured[0], "rows share the statistics of pass 1"
    tables = (folder / "tables.md").read_text()
    (folder / "aptq_50" / "metrics.json").unlink()
    (folder / "tables.md").unlink()
    again = aptq(*command)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("perplexity on c4") == 1, "only the row without an end was run"
    assert (folder / "tables.md").read_text() == tables
