"""What the paper's page tells: the printed figures and, beside them, those of our runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aptq.errors import AptqError
from aptq.paper.published import FIGURE_2, FULL_PRECISION, REMARKS, TABLE_1, TABLE_3, Published
from aptq.paper.shares import by_share
from aptq.report.words import change, figure
from aptq.run import Run

TEXTS = ("c4", "wikitext2")
"""Names of the evaluation texts that the paper's columns are of."""

_NONE = "–"


@dataclass(frozen=True, kw_only=True)
class Ours:
    """One result of ours; a perplexity of None was not finite."""

    bits: float | None  # of a code; None in full precision
    storage: float | None  # with scales and zeros
    perplexity: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a table; ``cells`` are spelled in the order of ``Content.columns``."""

    label: str
    cells: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the paper."""

    title: str
    lines: Sequence[Line]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Ways of choosing the 4-bit weights side by side: a line for each share of them."""

    ways: Sequence[str]
    lines: Sequence[tuple[str, Sequence[tuple[str, bool]]]]  # share; perplexities, and whether it is the line's best


@dataclass(frozen=True, kw_only=True)
class Content:
    """Everything on the page."""

    model: str
    settings: Sequence[tuple[str, str, str]]  # what, in the paper, here
    tables: Sequence[Table]
    remarks: Sequence[str]
    rows: Sequence[tuple[str, str]]  # name of a run, its folder's name
    ours: Mapping[str, Ours]  # by row, the original among them where it was judged
    others: Sequence[str]  # rows that neither the paper nor ``shares`` has
    shares: Shares | None  # where there is more than one way
    columns: Sequence[str] = ("bits", "C4", "WikiText-2", "bits", "with scales", "C4", "WikiText-2")
    of_the_paper: int = 3  # so many of the columns, from the left


def collect(runs: Mapping[str, Run]) -> Content:
    """Read the finished runs of a paper run, by the name of their row.

    Raises:
        AptqError: there are no runs, or one is not finished.
    """
    if not runs:
        raise AptqError("The paper's tables need at least one row.")
    ours = {name: _ours(run.metrics()) for name, run in runs.items()}
    baselines = [baseline for run in runs.values() if (baseline := run.metrics()["baseline_perplexity"])]
    if baselines:
        ours[FULL_PRECISION] = Ours(bits=None, storage=None, perplexity=baselines[0])
    shown = {each.row for each in (*TABLE_1, *TABLE_3, *FIGURE_2)}
    ways = by_share({name: ours[name] for name in runs})
    counted = {id(each) for way in ways.values() for each in way.values()}
    others = [name for name in runs if name not in shown and id(ours[name]) not in counted]
    tables = [
        Table(title=title, lines=[_line(each.label, each, ours.get(each.row or ""), ours) for each in printed])
        for title, printed in (
            ("Table 1: perplexity", TABLE_1),
            ("Figure 2: the share of 4-bit weights", FIGURE_2),
            ("Table 3: ranked layers or whole blocks", TABLE_3),
        )
    ]
    if others:
        tables.append(Table(title="Not in the paper", lines=[_line(name, None, ours[name], ours) for name in others]))
    config = next(iter(runs.values())).config
    return Content(
        model=str(config["model"]["path"]),
        settings=_settings(config),
        tables=tables,
        remarks=REMARKS,
        rows=[(name, run.folder.name) for name, run in runs.items()],
        ours=ours,
        others=others,
        shares=_shares(ways) if len(ways) > 1 else None,
    )


def _ours(metrics: Mapping[str, Any]) -> Ours:
    return Ours(bits=metrics["bits"]["code"], storage=metrics["bits"]["storage"], perplexity=metrics["perplexity"])


def _shares(ways: Mapping[str, Mapping[int, Ours]]) -> Shares:
    lines = []
    for share in sorted({share for way in ways.values() for share in way}, reverse=True):
        found = [way.get(share) for way in ways.values()]
        first = [math.inf if (value := _c4(mine)) is None else value for mine in found]
        best = min(first) if len(found) - found.count(None) > 1 else -math.inf
        cells = [
            (_NONE if mine is None else _both(mine), value == best < math.inf)
            for mine, value in zip(found, first, strict=True)
        ]
        lines.append((f"{share} %", cells))
    return Shares(ways=list(ways), lines=lines)


def _c4(mine: Ours | None) -> float | None:
    return None if mine is None else mine.perplexity.get(TEXTS[0])


def _both(mine: Ours) -> str:
    return " / ".join(figure(mine.perplexity.get(text)) for text in TEXTS)


def _line(label: str, published: Published | None, mine: Ours | None, ours: Mapping[str, Ours]) -> Line:
    """Set a printed result and ours side by side."""
    cells = [_NONE] * 3
    if published is not None:
        first = TABLE_1[0]
        cells = [str(published.bits), _perplexity(published.c4, first.c4), _NONE]
        if published.wikitext2 is not None:
            cells[2] = _perplexity(published.wikitext2, first.wikitext2)
    widths = (None, None) if mine is None else (mine.bits, mine.storage)
    cells += [_NONE if width is None else f"{width:.2f}" for width in widths]
    base = ours.get(FULL_PRECISION)
    for text in TEXTS:
        if mine is None or text not in mine.perplexity:
            cells.append(_NONE)
        else:
            cells.append(_perplexity(mine.perplexity[text], None if base is None else base.perplexity.get(text)))
    return Line(label=label, cells=cells)


def _perplexity(value: float | None, base: float | None) -> str:
    """Spell a perplexity with its change from full precision, which has none itself."""
    told = change(base, value) if value != base else ""
    return f"{figure(value)} ({told})" if told else figure(value)


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    data, evaluator = config["data"], config["evaluator"]
    windows = evaluator.get("num_sequences")
    return [
        ("model", "LLaMA-7B", str(config["model"]["path"])),
        ("calibration", "128 samples of 2048 tokens, C4", f"{data['num_samples']} samples of {data['sequence_length']} "
         f"tokens, {_source(data)}"),
        ("evaluation", "not said", f"{'all' if windows is None else f'up to {windows}'} windows of "
         f"{evaluator.get('sequence_length')} tokens of each text"),
        ("groups", "128", str(config["format"]["group_size"])),
    ]  # fmt: skip


def _source(data: Mapping[str, Any]) -> str:
    if data["source"] == "hub":
        return str(data["hub"].get("path"))
    return str(data["path"]) if data["source"] == "text" else str(data["source"])
