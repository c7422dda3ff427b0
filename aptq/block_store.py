"""Finished blocks on disk: what a killed run goes on from."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from aptq.api import LayerReport
from aptq.errors import AptqError
from aptq.files import clean_leftovers, sha256, write_json, write_tensors

_LOGGER = logging.getLogger(__name__)


class BlockStore:
    """A folder with two files a block: ``00012.safetensors`` and, written after it, ``00012.json``.

    The second one makes the block count: it holds the size and the SHA-256 of the first, and the layers' reports.
    Tensors are named ``layer.tensor``; the part after the last dot is the name that the format gave it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._verified: set[int] = set()
        self._files: dict[str, Path] = {}  # layer -> the file that holds it

    def save(self, index: int, tensors: Mapping[str, Tensor], reports: list[LayerReport]) -> None:
        """Write a block; it counts as done when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, record = self._paths(index)
        record.unlink(missing_ok=True)  # the old record does not fit the new tensors
        write_tensors(path, tensors, {"format": "pt", "block": str(index)}, f"block {index}")
        data = {
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
            "layers": sorted({name.rpartition(".")[0] for name in tensors}),
            "reports": [asdict(report) for report in reports],
        }
        write_json(record, _without_nan(data), f"the record of block {index}")
        self._verified.add(index)

    def done(self, index: int) -> bool:
        """Say whether a block is there and whole; one that is damaged counts as not done, with a warning."""
        if index in self._verified:
            return True
        path, record = self._paths(index)
        if not record.exists():
            return False
        reason = _damage(path, record)
        if reason:
            _LOGGER.warning("block %d is damaged (%s) and will be done again: %s", index, reason, path)
            return False
        self._verified.add(index)
        return True

    def load(self, index: int) -> tuple[dict[str, Tensor], list[LayerReport]]:
        """Return the tensors and reports of a finished block, on the CPU."""
        path, record = self._paths(index)
        if not self.done(index):
            raise AptqError(f"Block {index} is not finished: there is no whole {path}.")
        reports = json.loads(record.read_text(encoding="utf-8"))["reports"]
        return load_file(path), [LayerReport(**_with_nan(report)) for report in reports]

    def packed(self, layer: str) -> dict[str, Tensor]:
        """Read the tensors of one layer, under the names that the format gave them."""
        if layer not in self._files:
            self._index()
        if layer not in self._files:
            raise AptqError(
                f"No finished block in {self.folder} holds layer {layer!r}. Blocks are removed when a run ends well, "
                "unless it was started with run.keep_blocks=true."
            )
        with safe_open(self._files[layer], framework="pt") as file:
            names = {name: name.rpartition(".") for name in file.keys()}  # noqa: SIM118 - no mapping
            return {short: file.get_tensor(name) for name, (owner, _, short) in names.items() if owner == layer}

    def remove(self) -> None:
        """Remove all blocks."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._verified.clear()
        self._files.clear()

    def clean(self) -> None:
        """Remove what interrupted writes left."""
        clean_leftovers(self.folder)

    def _index(self) -> None:
        for record in sorted(self.folder.glob("*.json")):
            if self.done(int(record.stem)):
                for layer in json.loads(record.read_text(encoding="utf-8"))["layers"]:
                    self._files[layer] = record.with_suffix(".safetensors")

    def _paths(self, index: int) -> tuple[Path, Path]:
        path = self.folder / f"{index:05d}.safetensors"
        return path, path.with_suffix(".json")


def _damage(path: Path, record: Path) -> str | None:
    """Return what is wrong with a block, or None."""
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
        size, digest = data["bytes"], data["sha256"]
        [LayerReport(**_with_nan(report)) for report in data["reports"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its record cannot be read: {error}"
    if not path.exists():
        return "its tensors are missing"
    if path.stat().st_size != size:
        return f"{path.stat().st_size} of {size} bytes"
    return None if sha256(path) == digest else "its checksum differs"


def _without_nan(data: dict[str, Any]) -> dict[str, Any]:
    """Spell numbers that JSON has no word for as strings ("nan", "inf")."""
    reports = [{key: _spelled(value) for key, value in report.items()} for report in data["reports"]]
    return {**data, "reports": reports}


def _spelled(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(value) if value in ("nan", "inf", "-inf") else value for key, value in report.items()}
