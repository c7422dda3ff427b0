"""Progress: how far a run is, on the terminal or as log lines."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.logging import RichHandler
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from aptq.api import Callback, LayerReport

_LOGGER = logging.getLogger(__name__)
_WIDE = 80  # columns that the bar with all its figures takes


@dataclass
class Progress(Callback):
    """Show stage, block, layer, time elapsed and left, and the error so far.

    On a terminal this is a live display on standard error, with log lines scrolling above it; elsewhere, a log line
    at the first block end or step after every ``interval`` seconds.
    """

    interval: float = 10.0
    refresh_per_second: float = 4.0

    def __post_init__(self) -> None:
        """Look at the terminal; the display itself starts with the first stage."""
        self.console: Console = Console(stderr=True)
        self._stage: _Stage | None = None
        self._errors = _Errors()
        self._live: Live | None = None
        self._restore: list[Callable[[], object]] = []
        self._logged = 0.0

    def on_run_start(self, *, folder: Path, config: Mapping[str, Any]) -> None:
        """Take away what an earlier run left."""
        self.close()

    def on_stage_start(self, *, stage: str, total: int, unit: str) -> None:
        """Begin a bar, with no errors yet: those of an earlier stage say nothing about this one."""
        self.close()
        self._errors = _Errors()
        self._stage = _Stage(stage, total, unit)
        self._logged = time.monotonic()
        if self.console.is_interactive:
            self._start()

    def on_advance(self, *, stage: str, done: float, detail: str) -> None:
        """Move the bar."""
        if self._stage is not None:
            self._stage.advance(done, detail)
            self._log()

    def on_layer_end(self, *, stage: str, report: LayerReport) -> None:
        """Take in the layer's error."""
        self._errors.add(report)

    def on_block_end(self, *, stage: str, index: int, metrics: Mapping[str, float]) -> None:
        """Write a line when it is time for one."""
        self._log()

    def on_stage_end(self, *, stage: str, seconds: float) -> None:
        """Leave one line for the stage."""
        ended = self._stage
        self.close()
        if ended is None:
            return
        line = f"{ended.name}: {ended.total} {_plural(ended.unit, ended.total)} in {_clock(seconds)}"
        if self.console.is_interactive:
            self.console.print(Text.assemble(("✓ ", "green"), line))
            _LOGGER.debug(line)
        else:
            _LOGGER.info(line)

    def on_run_end(self, *, folder: Path, metrics: Mapping[str, Any]) -> None:
        """Take the display away."""
        self.close()

    def close(self) -> None:
        """Take the display away and give the terminal back; safe to call at any time, any number of times."""
        live, self._live, self._stage = self._live, None, None
        for restore in self._restore:
            restore()
        self._restore = []
        if live is not None:
            live.stop()

    def _start(self) -> None:
        streams = (sys.stdout, sys.stderr)
        self._live = Live(
            get_renderable=self._render,
            console=self.console,
            refresh_per_second=self.refresh_per_second,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # what goes to a file stays there
            redirect_stderr=sys.stderr.isatty(),
        )
        self._live.start()
        led = {id(old): new for old, new in zip(streams, (sys.stdout, sys.stderr), strict=True) if old is not new}
        for handler in logging.getLogger().handlers:
            self._lead_above(handler, led)

    def _lead_above(self, handler: logging.Handler, led: Mapping[int, TextIO]) -> None:
        """Lead a handler's lines above the bar: handlers hold on to the stream or console they were made with."""
        if isinstance(handler, RichHandler) and id(handler.console.file) in led:
            self._restore.append(partial(setattr, handler, "console", handler.console))
            handler.console = self.console
        elif isinstance(handler, logging.StreamHandler) and id(handler.stream) in led:
            self._restore.append(partial(handler.setStream, handler.stream))
            handler.setStream(led[id(handler.stream)])

    def _render(self) -> RenderableType:
        stage = self._stage
        if stage is None:
            return Text("")
        head: RenderableType
        if self.console.width < _WIDE:
            head = Text(f"{stage.name} {stage.position()} {_clock(stage.left())} left", "bold", no_wrap=True)
        else:
            head = Table.grid(padding=(0, 1), expand=False)
            head.add_row(
                Text(stage.name, style="bold"),
                ProgressBar(total=max(stage.total, 1), completed=stage.done, width=24),
                Text(stage.position(), style="cyan"),
                Text(f"{_clock(stage.elapsed())} elapsed"),
                Text(f"{_clock(stage.left())} left"),
            )
        below = "  ".join(filter(None, (stage.detail, str(self._errors))))
        return Group(head, Text(f"  {below}", style="dim", overflow="ellipsis", no_wrap=True))

    def _log(self) -> None:
        now = time.monotonic()
        if self._stage is None or self._live is not None or now - self._logged < self.interval:
            return
        self._logged = now
        stage = self._stage
        parts = (
            f"{stage.name}: {stage.position()}",
            stage.detail,
            f"{_clock(stage.elapsed())} elapsed",
            f"{_clock(stage.left())} left",
            str(self._errors),
        )
        _LOGGER.info(", ".join(filter(None, parts)))


@dataclass
class _Stage:
    """How far one stage is, and how fast."""

    name: str
    total: int
    unit: str
    done: float = 0.0
    detail: str = ""
    started: float = field(default_factory=lambda: time.monotonic())
    moved: float = field(default_factory=lambda: time.monotonic())
    pace: deque[float] = field(default_factory=lambda: deque(maxlen=8))  # seconds a unit, of the latest steps

    def advance(self, done: float, detail: str) -> None:
        now = time.monotonic()
        self.detail = detail
        if done > self.done:
            self.pace.append((now - self.moved) / (done - self.done))
            self.done, self.moved = done, now

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def left(self) -> float | None:
        """Seconds left; None before the first step.

        By the upper median of the latest steps, so that a resumed run, whose first blocks come from the disk, does
        not promise too much.
        """
        if not self.pace:
            return None
        pace = sorted(self.pace)[len(self.pace) // 2]
        return max(0.0, (self.total - self.done) * pace - (time.monotonic() - self.moved))

    def position(self) -> str:
        at = min(int(self.done) + 1, self.total) if self.done < self.total else self.total
        return f"{self.unit} {at}/{self.total}"


@dataclass
class _Errors:
    """Mean relative error of the layers finished so far."""

    total: float = 0.0
    count: int = 0
    bits: int | None = None

    def add(self, report: LayerReport) -> None:
        self.bits = report.bits
        if math.isfinite(report.relative_error):
            self.total += report.relative_error
            self.count += 1

    def __str__(self) -> str:
        if not self.count:
            return ""
        return f"mean relative error {self.total / self.count:.4f}, last layer {self.bits} bits"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _plural(unit: str, count: int) -> str:
    return unit if count == 1 or unit.endswith("s") else f"{unit}s"
