"""Turns at a folder."""

import multiprocessing
import time
from pathlib import Path

import pytest

from aptq.locks import turn


def _hold(path: Path, seconds: float, ready: "multiprocessing.synchronize.Event") -> None:  # type: ignore[name-defined]
    with turn(path, "busy"):
        ready.set()
        time.sleep(seconds)


@pytest.mark.skipif("sys.platform == 'win32'", reason="no locks there")
def test_waits_for_another_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("spawn")
    ready, path = context.Event(), tmp_path / "locks" / "a"
    other = context.Process(target=_hold, args=(path, 0.5, ready))
    other.start()
    assert ready.wait(60)
    started = time.monotonic()
    with caplog.at_level("INFO"), turn(path, "busy"):
        assert time.monotonic() - started > 0.2
    other.join()
    assert "Another process is busy" in caplog.text


def test_one_after_the_other_and_different_ones_at_once(tmp_path: Path) -> None:
    for _ in range(2):
        with turn(tmp_path / "a", "busy"), turn(tmp_path / "b", "busy"):
            pass
