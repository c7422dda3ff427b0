"""Tiles of the Triton kernels that are worth a try on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from aptq.kernels.triton.configs import (
    DENSE,
    DENSE_VECTORS,
    DOTS,
    FOUR_ROWS,
    LOOKED_UP,
    MOST_ROWS,
    ONE_ROW,
    TWO_ROWS,
    VECTORS,
    Case,
    Config,
)

LARGE = Config(kernel="gemv", units=8, columns=256, programs=3)


def candidates(case: Case) -> Iterator[Config]:
    """Yield configs for a case; which of them is best is to be measured."""
    if case.kind:
        yield from _looked_up(case)
        return
    if case.rows == 1:
        shipped: tuple[Config, ...] = (*ONE_ROW, LARGE)
    elif case.rows <= 4:
        shipped = (*TWO_ROWS, *FOUR_ROWS) if case.rows == 2 else FOUR_ROWS
    else:
        shipped = ()
    if 1 < case.rows <= MOST_ROWS:
        rows = max(16, 1 << (case.rows - 1).bit_length())
        shipped += (DOTS[rows], replace(DOTS[rows], units=2, stages=3), replace(DOTS[rows], columns=64, warps=4))
    if case.rows >= 16:
        shipped += (DENSE,)
    if case.rows > MOST_ROWS:
        shipped += (DOTS[64],)
    for config in shipped:
        if config.kernel == "dense":
            yield config
            continue
        for programs in {config.programs // 2, config.programs, 2 * config.programs}:
            yield replace(config, programs=programs)


def _looked_up(case: Case) -> Iterator[Config]:
    """Yield configs for kernels of values that are looked up."""
    if case.rows >= 4:
        yield DENSE_VECTORS if case.kind == "vectors" else DENSE
    if case.rows > 2 * 8:
        return
    first = (VECTORS if case.kind == "vectors" else LOOKED_UP)[min(4, 1 << (case.rows - 1).bit_length())]
    for config in (first, replace(first, columns=2 * first.columns), replace(first, units=8, warps=8)):
        for programs in (2, 4, 8):
            yield replace(config, programs=programs)
