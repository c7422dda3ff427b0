"""Stages tell how long they took and how much memory, and callbacks hear of them."""

import threading
import time

import numpy as np
import pytest
import torch

from aptq.api import Callback
from aptq.stages import Stages

CPU = torch.device("cpu")


class Heard(Callback):
    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []

    def on_stage_start(self, *, stage: str, total: int, unit: str) -> None:
        self.events.append(("start", stage, total, unit))

    def on_stage_end(self, *, stage: str, seconds: float) -> None:
        self.events.append(("end", stage, seconds))


def test_a_stage_is_timed_and_told() -> None:
    heard = Heard()
    stages = Stages(heard, CPU)
    with stages("work", 3, "block"):
        time.sleep(0.02)
    assert stages.seconds["work"] >= 0.02
    assert heard.events == [("start", "work", 3, "block"), ("end", "work", stages.seconds["work"])]


def test_memory_that_a_stage_gave_back_is_its_own() -> None:
    stages = Stages(Callback(), CPU)
    with stages("before"):
        pass
    with stages("much"):
        held = np.ones(32_000_000)  # 256 MB, touched
        time.sleep(0.2)
        del held
    with stages("after"):
        pass
    peaks = {name: each["peak_rss_bytes"] or 0 for name, each in stages.memory.items()}
    assert peaks["much"] > max(peaks["before"], peaks["after"]) + 200_000_000
    assert all(each["peak_device_bytes"] is None for each in stages.memory.values())
    whole = stages.peaks()
    assert (whole["peak_rss_bytes"] or 0) >= peaks["much"] - 10_000_000
    assert whole["peak_device_bytes"] is None


def test_a_stage_that_fails_leaves_nobody_watching() -> None:
    stages = Stages(Callback(), CPU)
    with pytest.raises(ValueError, match="broken"), stages("work"):
        raise ValueError("broken")
    assert not stages.seconds
    assert not any(thread.name == "aptq-memory" for thread in threading.enumerate())
