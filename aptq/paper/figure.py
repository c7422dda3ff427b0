"""Figure 2: perplexity on C4 against the average bits, as printed and of our runs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from aptq.paper.content import Content, Ours
from aptq.paper.published import FIGURE_2, FULL_PRECISION, MANUAL_50, MANUAL_75, TABLE_1
from aptq.paper.shares import by_share
from aptq.report.figures import png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#2f6fb3", "#b3382c", "#c98a1b", "#7a4fa3", "#2c8c5a", "#5b6570")
_STYLES = ("--", ":", "-.", (0, (1, 3)))
_LEVELS = ("FP16, the original", "GPTQ", "OWQ", "LLM-QAT")  # as in the paper's figure
_WIDE = 3.0  # a range of more than so many times itself is drawn in logarithms
_Points = list[tuple[float, float]]  # average bits and perplexity


def draw(content: Content) -> bytes:
    """Return the figure as a PNG file: the paper's on the left, ours on the right, on axes of their own."""
    figure = Figure(figsize=(11.0, 4.4))
    left, right = figure.subplots(1, 2)
    _panel(
        left,
        "The paper: LLaMA-7B",
        curves={
            "APTQ": [(each.bits, each.c4) for each in FIGURE_2],
            "manual block-wise": [(each.bits, each.c4) for each in (MANUAL_75[0], MANUAL_50[0])],
        },
        levels={each.label: each.c4 for each in TABLE_1 if each.label in _LEVELS},
    )
    levels = {"full precision": FULL_PRECISION, "GPTQ": "gptq_4", **{name: name for name in content.others}}
    _panel(
        right,
        f"Here: {content.model.rstrip('/').rpartition('/')[2]}",
        curves={label: _points(way.values()) for label, way in _ways(content).items()},
        levels={
            label: value for label, row in levels.items() if (value := _perplexity(content.ours.get(row))) is not None
        },
    )
    figure.tight_layout()
    return png(figure)


def _perplexity(mine: Ours | None) -> float | None:
    return None if mine is None else mine.perplexity.get("c4")


def _ways(content: Content) -> dict[str, dict[int, Ours]]:
    """Return the ways of choosing the 4-bit weights; of a single row, that."""
    rows = {name: ours for name, ours in content.ours.items() if name not in (FULL_PRECISION, *content.others)}
    return by_share(rows) or {name: {0: ours} for name, ours in rows.items() if name not in ("gptq_4", "rtn_4")}


def _points(results: Iterable[Ours]) -> _Points:
    """Return average bits and perplexity where there is both."""
    found = ((mine.bits, _perplexity(mine)) for mine in results)
    return [(bits, value) for bits, value in found if bits is not None and value is not None]


def _panel(axes: Axes, title: str, *, curves: dict[str, _Points], levels: dict[str, float]) -> None:
    for (label, points), color in zip(curves.items(), cycle(_COLORS)):
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=label)
    for index, (label, value) in enumerate(levels.items()):
        axes.axhline(value, color="#5b6570", linewidth=1.0, linestyle=_STYLES[index % len(_STYLES)], label=label)
    values = [*(value for points in curves.values() for _, value in points), *levels.values()]
    if values and max(values) > _WIDE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("average bits of a code")
    axes.set_ylabel("perplexity on C4")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if values:
        axes.legend(fontsize=8, frameon=False)
