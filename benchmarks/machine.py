"""Describes the machine that a benchmark ran on, in words that mean something elsewhere."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("aptq", "torch", "transformers", "safetensors", "tokenizers", "numpy")
VECTOR_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")
BUSY = 0.5  # load average from which timings are called rough


def cpu_model() -> str:
    """Return the processor's name as the system gives it, or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Return the vector instruction sets that decide how fast matrix products are."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return []
    flags: set[str] = set()
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
        if line.startswith(("flags", "Features")):
            flags.update(line.partition(":")[2].split())
            break
    return [name for name in VECTOR_FLAGS if name in flags]


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def memory_bytes() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Return the installed version of each package; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, object]:
    """Return processor, cores, memory, system and the load before the benchmark began."""
    return {
        "cpu": cpu_model(),
        "cpu_features": cpu_features(),
        "cores": usable_cores(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2),
    }


def kind(machine: dict[str, object]) -> str:
    """Return the machine in one line, whatever else it did."""
    features = machine["cpu_features"]
    assert isinstance(features, list)
    return (
        f"{machine['cpu']} ({', '.join(features) or 'no vector flags known'}), {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {machine['system']}"
    )


def sentence(machine: dict[str, object]) -> str:
    """Return the machine and its load in one line for a table's caption."""
    return f"{kind(machine)}, load before the run {machine['load_before']}"


def is_busy(machine: dict[str, object]) -> bool:
    """Return whether the machine had other work when it was described."""
    return float(str(machine["load_before"])) > BUSY
