"""Runs a command and measures its wall time, processor time and peak memory.

A child's ``ru_maxrss`` starts at what its *parent* held when it was started (Linux counts the memory image that
``exec`` replaces). The command is therefore started by a launcher that holds nothing: this file, run as a script,
which imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measurement:
    """What one process took, its own children included."""

    seconds: float  # wall time from start to exit
    cpu_seconds: float  # user + system
    peak_rss_bytes: int  # the largest resident set of any one process of the tree


def run_measured(command: Sequence[str], *, log: Path, env: Mapping[str, str], cwd: Path | None = None) -> Measurement:
    """Run a command in a fresh process, its output in a file.

    Args:
        command: program and arguments.
        log: file that takes standard output and errors.
        env: the whole environment of the command.
        cwd: working folder; the caller's when None.

    Raises:
        RuntimeError: when the command failed; the message ends with the last lines of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "measurement.json"
        launcher = [sys.executable, "-I", str(Path(__file__).resolve()), str(result), *command]
        with log.open("wb") as stream:
            subprocess.run(launcher, stdout=stream, stderr=subprocess.STDOUT, env=dict(env), cwd=cwd, check=False)
        figures = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {"returncode": "unknown"}
    if figures.pop("returncode") != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
        raise RuntimeError(f"The command failed: {' '.join(command)}\nIts log, {log}, ends with:\n{tail}")
    return Measurement(**figures)


def _launch(result: Path, command: Sequence[str]) -> None:
    """Start the command, wait for it and write down what it took."""
    start = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux
    figures = {
        "returncode": os.waitstatus_to_exitcode(status),
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * unit,
    }
    result.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    _launch(Path(sys.argv[1]), sys.argv[2:])
