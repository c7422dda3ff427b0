"""Virtual environments of peers: every peer pins versions of its own, so none can share aptq's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"  # the same for all, or timings would compare releases of torch
DEFAULT_CACHE = Path("~/.cache/aptq/peers").expanduser()


@dataclass(frozen=True)
class Environment:
    """A peer's packages; the folder's name tells their versions, so that a changed list makes a new environment."""

    name: str
    packages: Sequence[str]

    def interpreter(self, cache: Path) -> Path:
        """Return the environment's python, making the environment first where there is none.

        Raises:
            RuntimeError: the packages cannot be installed; the message ends with what pip said.
        """
        version = f"py{sys.version_info.major}{sys.version_info.minor}"
        label = "-".join([self.name, version, TORCH, *self.packages]).replace("==", "_")
        folder = cache / label
        python = folder / "bin" / "python"
        finished = folder / "finished"
        if not finished.exists():
            _run([sys.executable, "-m", "venv", "--clear", str(folder)])
            constraints = folder / "constraints.txt"
            constraints.write_text(f"{TORCH}\n", encoding="utf-8")
            _run([str(python), "-m", "pip", "install", "--quiet", TORCH])
            _run([str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), *self.packages])
            finished.touch()
        return python


def clean_environment(threads: int, *, isolated: bool) -> dict[str, str]:
    """Return the environment variables of a contestant: the same threads for all, no hub, no foreign packages."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV")}
    if isolated:
        variables.pop("PYTHONPATH", None)
    variables.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1")
    return variables


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(1, isolated=True), check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
