"""What layers take to decode one token, from the table that ``aptq -cn benchmark`` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aptq.api import AptqError, Option

_KEYS = {"backend", "format", "bits", "group_size", "shape", "rows", "dtype", "seconds", "device"}

DENSE = "dense"
"""What the table has in place of a backend for the product that is not packed."""

_Key = tuple[tuple[int, int], Option]


class DecodeTimes:
    """Seconds of one multiplication by a single row of activations, by shape and option."""

    def __init__(self, path: Path, rows: Iterable[Mapping[str, Any]], backend: str = "auto") -> None:
        """Take rows of ``benchmark.json``; where several backends can run a layer, the fastest counts.

        Args:
            path: where the rows are from, for messages.
            rows: those of more than one row of activations, and of dense products, are left out.
            backend: the one that will run the layers; "auto" for the best of all.

        Raises:
            AptqError: nothing of that backend is there, or times of several devices or dtypes.
        """
        self._path, self._backend = path, backend
        taken = [
            row for row in rows if row["rows"] == 1 and row["backend"] != DENSE and backend in ("auto", row["backend"])
        ]
        if not taken:
            raise AptqError(
                f"{path} has no times of decoding (rows=1) by backend={backend}; run aptq -cn benchmark "
                "benchmark.rows=[1] with it."
            )
        for what in ("device", "dtype"):
            if len(found := sorted({str(row[what]) for row in taken})) > 1:
                raise AptqError(
                    f"{path} has times of several values of {what}: {', '.join(found)}; measure the one that will run "
                    "the model (benchmark.dtypes=[float32], for example)."
                )
        self._seconds: dict[_Key, float] = {}
        for row in taken:
            shape = (int(row["shape"][0]), int(row["shape"][1]))
            key = shape, Option(int(row["bits"]), int(row["group_size"]), str(row["format"]))
            self._seconds[key] = min(float(row["seconds"]), self._seconds.get(key, float("inf")))

    @classmethod
    def read(cls, path: Path, backend: str = "auto") -> DecodeTimes:
        """Read ``benchmark.json``.

        Raises:
            AptqError: the file is not there, or is not what ``aptq -cn benchmark`` writes; see ``__init__``.
        """
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AptqError(f"decode_times={path} cannot be read: {error}") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= _KEYS for row in rows):
            raise AptqError(
                f"decode_times={path} is no table of aptq -cn benchmark, which has {', '.join(sorted(_KEYS))}."
            )
        return cls(path, rows, backend)

    def of(self, shapes: Mapping[str, tuple[int, int]], options: Iterable[Option]) -> dict[str, dict[Option, float]]:
        """Return the seconds of each layer at each option.

        Raises:
            AptqError: the table lacks some.
        """
        options = list(options)
        lost = [
            (shape, option)
            for shape in sorted(set(shapes.values()))
            for option in options
            if (shape, option) not in self._seconds
        ]
        if lost:
            shape, option = lost[0]
            raise AptqError(
                f"decode_times={self._path} lacks {len(lost)} times that the plan needs, that of a layer "
                f"{list(shape)} at {option.bits} bits, format {option.format}, group_size {option.group_size} for one; "
                "run aptq -cn benchmark benchmark.model=PATH with this format, these bits and group sizes."
            )
        return {name: {option: self._seconds[shape, option] for option in options} for name, shape in shapes.items()}
