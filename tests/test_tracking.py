"""Loggers are told the config, the figures of blocks, the final ones, and how the run ended."""

from pathlib import Path
from typing import Any

import pytest

from aptq.api import Callback
from aptq.callbacks import Callbacks
from aptq.tracking import LoggerCallback


class Probe:
    """A logger that remembers."""

    def __init__(self) -> None:
        self.status = ""
        self.params: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self.params = params

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))

    def finalize(self, status: str) -> None:
        self.status += status


def feed(*probes: Probe) -> Callback:
    return LoggerCallback(probes)  # type: ignore[arg-type]


def test_every_logger_gets_config_blocks_and_numbers_of_the_metrics() -> None:
    probes = Probe(), Probe()
    with Callbacks([feed(*probes)]) as callbacks:
        callbacks.on_run_start(folder=Path("x"), config={"seed": 0})
        callbacks.on_block_end(stage="quantize", index=4, metrics={"error": 0.5})
        callbacks.on_block_end(stage="quantize", index=5, metrics={})
        callbacks.on_stage_end(stage="quantize", seconds=2.0)
        metrics = {"perplexity": {"c4": 40.5, "bad": None}, "samples": [], "versions": {"x": "1"}, "peak_rss_bytes": 7}
        callbacks.on_run_end(folder=Path("x"), metrics=metrics)
    for probe in probes:
        assert probe.params == {"seed": 0}
        assert probe.logged == [
            (4, {"quantize/error": 0.5}),
            (5, {"seconds/quantize": 2.0}),
            (6, {"perplexity/c4": 40.5, "peak_rss_bytes": 7.0}),
        ]
        assert probe.status == "success"


def test_a_run_that_breaks_off_ends_as_failed() -> None:
    probe = Probe()
    with pytest.raises(RuntimeError, match="boom"), Callbacks([feed(probe)]):
        raise RuntimeError("boom")
    assert probe.status == "failed"


def test_loggers_are_ended_once() -> None:
    probe = Probe()
    with Callbacks([feed(probe)]) as callbacks, callbacks:
        callbacks.on_run_end(folder=Path("x"), metrics={})
    assert probe.status == "success"
