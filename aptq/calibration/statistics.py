"""The statistics cache: what pass 1 found, kept by the content it was computed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aptq.api import LayerStatistics, LossChange, Option
from aptq.files import write_json


@dataclass(frozen=True)
class StatisticsCache:
    """One JSON file a block under ``folder / key``; a budget sweep finds them all and pass 1 is not run again."""

    folder: Path
    key: str

    def load(self, index: int) -> list[LayerStatistics] | None:
        """Return a block's statistics, or None where they are not known (or were cut off while being written)."""
        try:
            rows = json.loads(self._path(index).read_text())
            return [_from_json(row) for row in rows]
        except (FileNotFoundError, json.JSONDecodeError, KeyError):
            return None

    def load_all(self, num_blocks: int) -> dict[str, LayerStatistics] | None:
        """Return the statistics of all blocks by name, or None where some are not known."""
        cached = [self.load(index) for index in range(num_blocks)]
        if any(rows is None for rows in cached):
            return None
        return {entry.name: entry for rows in cached if rows is not None for entry in rows}

    def save(self, index: int, statistics: list[LayerStatistics]) -> None:
        """Keep a block's statistics; the file appears whole or not at all."""
        self._path(index).parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path(index), [_to_json(entry) for entry in statistics])

    def _path(self, index: int) -> Path:
        return self.folder / self.key / f"{index:04d}.json"


def content_key(parts: Mapping[str, Any]) -> str:
    """Return a name for what the statistics depend on: equal parts give equal keys, on any machine."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def code_fingerprint() -> str:
    """Return a digest of this package's source: statistics of other code are not trusted."""
    digest = hashlib.blake2b(digest_size=16)
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _to_json(entry: LayerStatistics) -> dict[str, Any]:
    changes = {option: asdict(change) for option, change in entry.loss_changes.items()}
    return {
        "name": entry.name,
        "shape": list(entry.shape),
        "tokens": entry.tokens,
        "trace": entry.trace,
        "errors": _by_option_to_json(entry.errors),
        "distances": _by_option_to_json(entry.distances),
        "loss_changes": _by_option_to_json(changes),
        "divergences": _by_option_to_json(entry.divergences),
    }


def _from_json(row: Mapping[str, Any]) -> LayerStatistics:
    changes = _by_option_from_json(row["loss_changes"])
    return LayerStatistics(
        name=row["name"],
        shape=(row["shape"][0], row["shape"][1]),
        tokens=row["tokens"],
        trace=row["trace"],
        errors=_by_option_from_json(row["errors"]),
        distances=_by_option_from_json(row["distances"]),
        loss_changes={option: LossChange(**change) for option, change in changes.items()},
        divergences=_by_option_from_json(row["divergences"]),
    )


def _by_option_to_json(values: Mapping[Option, Any]) -> list[list[Any]]:
    return [[option.bits, option.group_size, option.format, value] for option, value in values.items()]


def _by_option_from_json(rows: list[list[Any]]) -> dict[Option, Any]:
    return {Option(bits, group_size, format): value for bits, group_size, format, value in rows}
