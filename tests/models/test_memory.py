"""Freed memory goes back to the system."""

import subprocess
import sys

import pytest

_FRAGMENTED = """
import psutil, torch
from aptq.models.memory import trim
rss = psutil.Process().memory_info
held = []
for _ in range(200):  # large tensors between small ones that stay
    held.append((torch.zeros(100_000), bytes(2000)))
small = [pair[1] for pair in held]
before = rss().rss
held.clear()
trim()
print(before - rss().rss)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other C libraries have no malloc_trim")
def test_trim_lowers_resident_memory() -> None:
    done = subprocess.run([sys.executable, "-c", _FRAGMENTED], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 60_000_000
