"""Progress: a live display on a terminal, log lines elsewhere, and a terminal left as it was."""

import io
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.logging import RichHandler

from aptq.api import LayerReport
from aptq.callbacks import Callbacks
from aptq.callbacks.progress import Progress


def report(error: float, bits: int = 3) -> LayerReport:
    return LayerReport(
        name="a", out_features=8, in_features=4, bits=bits, group_size=-1, format="integer",
        storage_bits=3.1, tokens=9, trace=0.1,
        predicted_cost=None, error_nearest=0.3, error=0.2, relative_error=error, damping=0.0, seconds=0.5, events="",
    )  # fmt: skip


class Clock:
    """Stands in for the monotonic clock."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def quiet(**options: Any) -> Progress:
    progress = Progress(**options)
    progress.console = Console(file=io.StringIO(), force_terminal=False)
    return progress


def live(width: int = 100) -> tuple[Progress, io.StringIO]:
    progress, screen = Progress(refresh_per_second=50), io.StringIO()
    progress.console = Console(file=screen, force_terminal=True, width=width, _environ={"TERM": "xterm"})
    return progress, screen


def work(progress: Progress, clock: Clock, blocks: range, seconds: float) -> None:
    for index in blocks:
        progress.on_advance(stage="quantize", done=index + 0.5, detail=f"layers.{index}.mlp")
        clock.now += seconds
        progress.on_layer_end(stage="quantize", report=report(0.01 * (index + 1), bits=4))
        progress.on_advance(stage="quantize", done=index + 1, detail=f"layers.{index}")
        progress.on_block_end(stage="quantize", index=index, metrics={})


def test_without_a_terminal_lines_are_logged_at_the_interval(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    progress = quiet(interval=20.0)
    with caplog.at_level(logging.INFO):
        progress.on_run_start(folder=Path("x"), config={})
        progress.on_stage_start(stage="quantize", total=10, unit="block")
        work(progress, clock, range(10), 10.0)
        progress.on_stage_end(stage="quantize", seconds=100.0)
    assert len(caplog.messages) == 6
    assert "mean relative error 0.0150, last layer 4 bits" in caplog.messages[0]
    assert "block 3/10" in caplog.messages[0]
    assert "0:20 elapsed" in caplog.messages[0]
    assert caplog.messages[-1] == "quantize: 10 blocks in 1:40"


def test_time_left_follows_the_pace_of_work(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    progress = quiet(interval=0.0)
    with caplog.at_level(logging.INFO):
        progress.on_stage_start(stage="evaluate", total=10, unit="window")
        clock.now += 1
        progress.on_advance(stage="evaluate", done=0, detail="c4")
        for done in range(1, 5):
            clock.now += 30
            progress.on_advance(stage="evaluate", done=done, detail="c4")
    assert "-:-- left" in caplog.messages[0]
    assert "3:00 left" in caplog.messages[-1]


def test_a_resumed_run_does_not_promise_too_much(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    progress = quiet(interval=0.0)
    with caplog.at_level(logging.INFO):
        progress.on_stage_start(stage="quantize", total=30, unit="block")
        clock.now += 0.1
        progress.on_advance(stage="quantize", done=20, detail="from disk")
        clock.now += 60
        progress.on_advance(stage="quantize", done=21, detail="layers.20")
    assert "block 22/30" in caplog.messages[-1]
    assert "9:00 left" in caplog.messages[-1]


def test_errors_that_are_not_finite_are_left_out_of_the_mean(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    progress = quiet(interval=0.0)
    progress.on_stage_start(stage="quantize", total=2, unit="block")
    for error in (0.1, float("nan"), float("inf"), 0.3):
        progress.on_layer_end(stage="quantize", report=report(error))
    with caplog.at_level(logging.INFO):
        progress.on_block_end(stage="quantize", index=0, metrics={})
    assert "mean relative error 0.2000" in caplog.text


def test_errors_are_shown_in_their_own_stage_only(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    progress = quiet(interval=0.0)
    progress.on_stage_start(stage="quantize", total=1, unit="block")
    progress.on_layer_end(stage="quantize", report=report(0.1))
    progress.on_stage_end(stage="quantize", seconds=1.0)
    progress.on_stage_start(stage="evaluate", total=2, unit="model")
    with caplog.at_level(logging.INFO):
        progress.on_advance(stage="evaluate", done=1, detail="c4")
    assert "evaluate: model 2/2" in caplog.messages[-1]
    assert "error" not in caplog.messages[-1]


def test_a_terminal_shows_stage_block_layer_times_and_error() -> None:
    progress, screen = live()
    with Callbacks([progress]) as callbacks:
        callbacks.on_stage_start(stage="quantize", total=30, unit="block")
        callbacks.on_layer_end(stage="quantize", report=report(0.02))
        callbacks.on_advance(stage="quantize", done=3, detail="model.layers.3.mlp.up_proj")
        time.sleep(0.1)
        callbacks.on_stage_end(stage="quantize", seconds=65.0)
    shown = screen.getvalue()
    for part in ("quantize", "block 4/30", "elapsed", "left", "model.layers.3.mlp.up_proj", "error 0.0200"):
        assert part in shown
    assert shown.rstrip().endswith("quantize: 30 blocks in 1:05")


@pytest.mark.parametrize("width", [20, 40])
def test_a_narrow_terminal_keeps_to_its_width(width: int) -> None:
    progress, screen = live(width)
    with Callbacks([progress]) as callbacks:
        callbacks.on_stage_start(stage="quantize", total=30, unit="block")
        callbacks.on_advance(stage="quantize", done=3, detail="model.layers.3.mlp.experts.12.up_proj")
        time.sleep(0.05)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n")
    assert "quantize block 4/30" in plain
    assert max(map(len, plain.splitlines())) <= width


def test_an_exception_gives_the_terminal_back() -> None:
    progress, screen = live()
    streams = (sys.stdout, sys.stderr)

    def fail() -> None:
        with Callbacks([progress]) as callbacks:
            callbacks.on_stage_start(stage="measure", total=3, unit="block")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert (sys.stdout, sys.stderr) == streams
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") == 1  # the cursor
    progress.close()


@pytest.mark.parametrize("kind", ["stream", "rich"])
def test_log_lines_go_above_the_bar_and_handlers_are_put_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    progress, screen = live()

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal) if kind == "stream" else RichHandler(console=Console(stderr=True))
    logging.getLogger().addHandler(handler)
    try:
        with Callbacks([progress]) as callbacks:
            callbacks.on_stage_start(stage="quantize", total=3, unit="block")
            logging.getLogger("aptq.test").warning("damping raised")
            callbacks.on_stage_end(stage="quantize", seconds=1.0)
        assert "damping raised" in screen.getvalue()
        assert terminal.getvalue() == ""
        logging.getLogger("aptq.test").warning("after the stage")
        assert "after the stage" in terminal.getvalue()
    finally:
        logging.getLogger().removeHandler(handler)
