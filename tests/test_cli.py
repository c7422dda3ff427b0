"""The command line, as a user meets it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def aptq(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return ``run(*arguments)``: ``aptq`` in an empty folder."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "aptq", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "200"},
        )

    return run


def test_help_names_groups_and_keys(aptq: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = aptq("--help")
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
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    arguments: tuple[str, ...], message: str, aptq: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = aptq(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "nothing was begun, so nothing is left behind"


def test_a_sweep_leaves_one_run_each_and_prints_tables(
    aptq: Callable[..., subprocess.CompletedProcess[str]], tiny_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{number} bottles of beer on the wall" for number in range(99)))
    done = aptq(
        *("-m", f"model.path={tiny_model_folder()}", "data=text", f"data.path={text}", "data.num_samples=2"),
        *("data.sequence_length=64", f"data.evaluation_path={text}", "evaluator.num_sequences=2", "samples=1"),
        *("name=sweep", "allocator=uniform", "allocator.bits=3,4", "fabric=cpu"),
    )
    assert done.returncode == 0, done.stderr
    runs = sorted(path for path in (tmp_path / "runs" / "sweep").iterdir() if path.is_dir())
    assert len(runs) == 2
    for run in runs:
        assert {"model", "report.html", "metrics.json", "log.txt", "csv"} <= {path.name for path in run.iterdir()}
    assert done.stdout.count("perplexity on text") == 2
