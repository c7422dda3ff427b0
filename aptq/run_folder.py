"""The rules of a run folder: whose it is, who works in it, and whether a config may go on in it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from aptq.errors import AptqError
from aptq.files import disk_errors, is_leftover, write_text

if sys.platform != "win32":  # Windows has none: two runs in one folder go unnoticed there
    import fcntl

CONFIG = "config.yaml"
BLOCKS = "blocks"
MODEL = "model"
PLANS = "plans"
METRICS = "metrics.json"
_HEADER = "# Written by aptq: the resolved config of this run.\n"
_LOCK = ".lock"
_BEFORE_US = {_LOCK, ".hydra", "log.txt"}  # Hydra sets these up before a run begins; they are kept open
_TABLES = ("plan.json", "sensitivity.csv", "audit.json", "layers.csv", "trade_off.csv")
EXPORTS = "exports"
_OURS = (BLOCKS, MODEL, PLANS, EXPORTS, METRICS, *_TABLES, "report.html", "benchmark.json", "csv", "wandb", CONFIG)
_FIGURES = ("audit.png", "bits.png", "errors.png", "stages.png", "trade_off.png")
# Keys that cannot change a result, and keys that change only what comes after the blocks.
_IGNORED = (
    *("name", "run", "overwrite", "cache_dir", "logger", "callback", "hydra"),
    *("fabric.devices", "fabric.num_nodes", "fabric.strategy"),
)
_LATE = ("evaluator", "backend", "baseline", "samples", "data.evaluation_path", "data.evaluation_hub")


def lock(folder: Path) -> IO[str]:
    """Take the folder for this process until the file is closed or the process ends, however it ends.

    Raises:
        AptqError: another process holds it.
    """
    file = (folder / _LOCK).open("a+", encoding="utf-8")
    if sys.platform == "win32":
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise AptqError(
            f"{holder} is at work in the run folder {folder}. Wait for it or stop it, or choose another folder with "
            "name=... or run.dir=..."
        ) from None
    except OSError:  # a file system without locks: going on beats refusing
        return file
    file.truncate(0)
    file.write(f"Process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})")
    file.flush()
    return file


def refuse_foreign(folder: Path) -> None:
    """Raise ``AptqError`` when a folder holds files but no run of ours."""
    entries = sorted(path.name for path in folder.iterdir())
    strange = [name for name in entries if name not in _BEFORE_US and not is_leftover(name)]
    if not strange:
        return
    config = folder / CONFIG
    try:
        ours = config.read_text(encoding="utf-8").startswith(_HEADER)
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise AptqError(
            f"The folder {folder} is not empty and holds no run of aptq (it has {', '.join(strange[:5])}"
            f"{', ...' if len(strange) > 5 else ''}). Nothing was touched. Choose an empty or new folder with name=... "
            "or run.dir=..."
        )


def clear(folder: Path) -> None:
    """Remove what a run wrote; what others put there stays, and so do Hydra's own files of the run that begins.

    ``config.yaml`` goes last: it is what tells that the rest is ours.
    """
    with disk_errors(folder, "over the old run"):
        for name in (*_FIGURES, *_OURS):
            path = folder / name
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.is_dir():
                shutil.rmtree(path)


def is_finished(folder: Path) -> bool:
    """Say whether a run has all its results."""
    return (folder / METRICS).is_file() and (folder / MODEL).is_dir()


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the resolved config."""
    text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=120)
    write_text(folder / CONFIG, _HEADER + text, "the config")


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the config that a run was started with, or None when it was killed before it wrote one."""
    path = folder / CONFIG
    if not path.exists():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AptqError(f"{path} is damaged: {error}. Start anew with overwrite=true.") from error
    return config if isinstance(config, dict) else {}


def check_config(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Say whether what comes after the blocks has changed since the run began.

    Raises:
        AptqError: the blocks would come out differently; lists every key that differs.
    """
    changed = differences(old, plain(new))
    hard = {key: values for key, values in changed.items() if not _within(key, _LATE)}
    if hard:
        told = "\n".join(f"  {key}: {old_value!r} -> {new_value!r}" for key, (old_value, new_value) in hard.items())
        raise AptqError(
            f"The run in {folder} was started with another config:\n{told}\nGo on with the old values, start anew in "
            "this folder with overwrite=true, or choose another with name=... or run.dir=..."
        )
    return bool(changed)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return ``{dotted key: (old, new)}`` for all that differs and can matter; a missing key counts as None."""
    before, after = dict(_flat(old)), dict(_flat(new))
    keys = [*before, *(key for key in after if key not in before)]
    return {
        key: (before.get(key), after.get(key))
        for key in keys
        if before.get(key) != after.get(key) and not _within(key, _IGNORED)
    }


def plain(value: Any) -> Any:
    """Return a config as dicts, lists and scalars only, as it reads back from YAML."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        return [(prefix, None if value == {} else value)]
    return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}" if prefix else str(key))]


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def finished_runs(folder: Path) -> list[Path]:
    """Return the finished runs in a folder, by name."""
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and (path / CONFIG).is_file() and is_finished(path)
    )
