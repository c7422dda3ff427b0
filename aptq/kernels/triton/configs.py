"""Which kernel multiplies how many rows, in which tiles: rules of thumb, or a table that was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from aptq.errors import AptqError

KERNELS = ("gemv", "dot", "dense")
UNIT = 32
"""Inputs of a unit of the layout."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A kernel and its tiles.

    ``gemv`` sums in float32 without tensor cores, ``dot`` uses them; ``dense`` unpacks outputs for torch's product.
    A program takes ``rows`` of activations and ``columns`` outputs, and a part of all units of 32 inputs, ``units`` at
    a time. The inputs are cut into as many parts as it takes for ``programs`` programs on each multiprocessor.
    """

    kernel: str
    rows: int = 1
    units: int = 4
    columns: int = 128
    warps: int = 4
    stages: int = 2
    programs: int = 4

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise AptqError(f"A tuning table names the kernel {self.kernel!r}; there are {', '.join(KERNELS)}.")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a choice is made for."""

    rows: int
    out_features: int
    in_features: int
    bits: int
    levels: bool
    dtype: torch.dtype  # of the activations
    whole_units: bool  # whether groups are
    kind: str = ""  # of kernels, see ``PackedWeight``

    def key(self) -> tuple[Any, ...]:
        """Return what a table tells cases apart by; numbers of rows count up to the next power of two."""
        rows = 1 << (self.rows - 1).bit_length()
        dtype = str(self.dtype).removeprefix("torch.")
        key = rows, self.out_features, self.in_features, self.bits, self.levels, dtype, self.whole_units
        return (*key, self.kind) if self.kind else key


ONE_ROW = (Config(kernel="gemv", columns=256), Config(kernel="gemv", units=2, warps=2, programs=8))
"""From large to small: a small layer has too few tiles of the first to keep a GPU busy."""
TWO_ROWS = (Config(kernel="gemv", rows=2, columns=256), Config(kernel="gemv", rows=2, units=2, warps=2, programs=8))
FOUR_ROWS = (Config(kernel="gemv", rows=4, columns=256, programs=3), Config(kernel="gemv", rows=4, units=2, warps=2))
DOTS = {
    16: Config(kernel="dot", rows=16, programs=2),
    32: Config(kernel="dot", rows=32, units=2, programs=3),
    64: Config(kernel="dot", rows=64, units=2, programs=2),
}
DENSE = Config(kernel="dense", units=2, columns=256)
MOST_ROWS = 64
"""Of a product by ``dot``; more are multiplied by the dense weight."""
SHIPPED = (*ONE_ROW, *TWO_ROWS, *FOUR_ROWS, *DOTS.values(), DENSE)
LOOKED_UP = {rows: Config(kernel="gemv", rows=rows) for rows in (1, 2, 4)}
"""By rows of a program, for values that are looked up in large tables: 32 of them at a time for each thread."""
VECTORS = {rows: Config(kernel="gemv", rows=rows, columns=256) for rows in (1, 2, 4)}
"""By rows of a program, for vectors of neighbouring outputs: of 8, a thread has one."""
DENSE_VECTORS = Config(kernel="dense", units=4, columns=256)
MOST_LOOKED_UP = 8
"""Rows that are multiplied by such values as they are looked up."""


def rule_of_thumb(case: Case, processors: int) -> Config:
    """Choose without measurements, on a GPU of so many multiprocessors.

    One or two rows go to ``gemv``, whose arithmetic grows with the rows, and up to 64 to ``dot``; in float32, which
    tensor cores would round, up to eight to ``gemv``. Tiles are the largest of which there are two for every
    multiprocessor. Of other kinds (``Case.kind``) up to eight rows go to ``gemv``. These are deductions from counted
    instructions and registers (``benchmarks/results/kernels_compiled.md``), not from times.
    """
    if case.kind:
        of_vectors = case.kind == "vectors"
        if case.rows > MOST_LOOKED_UP:
            return DENSE_VECTORS if of_vectors else DENSE
        if case.kind == "blocks" and case.rows == 1:
            return _enough(case, ONE_ROW, processors)
        return (VECTORS if of_vectors else LOOKED_UP)[min(4, 1 << (case.rows - 1).bit_length())]
    by_dot = case.dtype != torch.float32 and case.whole_units
    if case.rows > (MOST_ROWS if by_dot else 8):
        return DENSE
    if case.rows <= 2 or not by_dot:
        return _enough(case, ONE_ROW if case.rows == 1 else TWO_ROWS if case.rows == 2 else FOUR_ROWS, processors)
    return DOTS[max(16, 1 << (case.rows - 1).bit_length())]


def _enough(case: Case, tiles: Sequence[Config], processors: int) -> Config:
    """Return the first of which there are two for every multiprocessor, or the last."""
    return next((tile for tile in tiles if _tiles(case, tile) >= 2 * processors), tiles[-1])


def _tiles(case: Case, config: Config) -> int:
    return -(-case.out_features // config.columns) * -(-case.in_features // UNIT // config.units)


def choose(case: Case, processors: int, table: str) -> Config:
    """Return what a table says of a case, or else the rule of thumb; ``table=""``: there is none.

    Raises:
        AptqError: the table cannot be read.
    """
    found = read_table(table).get(case.key()) if table else None
    return found or rule_of_thumb(case, processors)


@cache
def read_table(path: str) -> dict[tuple[Any, ...], Config]:
    """Return the configs of a table by ``Case.key``.

    Raises:
        AptqError: there is no such file, or it is no table.
    """
    try:
        read = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        return {tuple(entry["case"]): Config(**entry["config"]) for entry in read["entries"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AptqError(
            f"backend.tuning={path} is no tuning table ({type(error).__name__}: {error}); write one with "
            "benchmarks/kernels.py --tune FILE, or use backend.tuning=null."
        ) from error


def write_table(path: Path, device: str, entries: Sequence[tuple[Case, Config]]) -> None:
    """Write what was measured on a device."""
    rows = [{"case": list(case.key()), "config": asdict(config)} for case, config in entries]
    path.write_text(json.dumps({"device": device, "entries": rows}, indent=1) + "\n", encoding="utf-8")
