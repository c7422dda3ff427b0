"""The stages of a run: how long each takes, and how much memory."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil
import torch

from aptq.api import Callback

_EVERY = 0.05
"""Seconds between looks at the resident memory: the kernel keeps its peak for a whole process only."""


class Stages:
    """Times the stages of a run, watches their memory, and tells callbacks about them; one stage at a time."""

    def __init__(self, callbacks: Callback, device: torch.device) -> None:
        """Take the callbacks, and the device that is worked on."""
        self._callbacks, self._device = callbacks, device
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, Mapping[str, int | None]] = {}  # stage -> peak_rss_bytes, peak_device_bytes

    @contextmanager
    def __call__(self, stage: str, total: int = 1, unit: str = "step") -> Iterator[None]:
        """Run a stage of ``total`` units of work."""
        self._callbacks.on_stage_start(stage=stage, total=total, unit=unit)
        on_device = self._device.type == "cuda"
        if on_device:
            torch.cuda.reset_peak_memory_stats(self._device)
        started = time.perf_counter()
        with _Watch() as watch:
            yield
        self.seconds[stage] = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated(self._device) if on_device else None
        self.memory[stage] = {"peak_rss_bytes": watch.peak, "peak_device_bytes": peak}
        self._callbacks.on_stage_end(stage=stage, seconds=self.seconds[stage])

    def peaks(self) -> dict[str, int | None]:
        """Return the peak memory of the process in bytes: resident, and on the device where there is one."""
        on_device = [peak for each in self.memory.values() if (peak := each["peak_device_bytes"]) is not None]
        return {"peak_rss_bytes": _peak_of_process(), "peak_device_bytes": max(on_device, default=None)}


class _Watch:
    """Looks at this process's resident memory again and again, until it is left."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="aptq-memory", daemon=True)
        self.peak = self._now()

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        self.peak = max(self.peak, self._now())

    def _look(self) -> None:
        while not self._end.wait(_EVERY):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        return int(self._process.memory_info().rss)


def _peak_of_process() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
