"""Figure 2: perplexity on C4 against the average bits, as printed and of our runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from aptq.paper.content import Content, Ours
from aptq.paper.published import FIGURE_2, FULL_PRECISION, MANUAL_50, MANUAL_75, TABLE_1, Published
from aptq.report.figures import png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CURVE, _MANUAL = "#2f6fb3", "#b3382c"
_STYLES = ("--", ":", "-.", (0, (1, 3)))
_LEVELS = ("FP16, the original", "GPTQ", "OWQ", "LLM-QAT")  # as in the paper's figure
_WIDE = 3.0  # a range of more than so many times itself is drawn in logarithms
_Points = dict[str, tuple[float, float]]  # average bits and perplexity by name


def draw(content: Content) -> bytes:
    """Return the figure as a PNG file: the paper's on the left, ours on the right, on axes of their own."""
    figure = Figure(figsize=(11.0, 4.4))
    left, right = figure.subplots(1, 2)
    _panel(
        left,
        "The paper: LLaMA-7B",
        curve={each.label: (each.bits, each.c4) for each in FIGURE_2},
        manual={each.label: (each.bits, each.c4) for each in (*MANUAL_75, *MANUAL_50)},
        levels={each.label: each.c4 for each in TABLE_1 if each.label in _LEVELS},
    )
    levels = {"full precision": FULL_PRECISION, "GPTQ": "gptq_4", **{name: name for name in content.others}}
    _panel(
        right,
        f"Here: {content.model.rstrip('/').rpartition('/')[2]}",
        curve=_points(content, FIGURE_2),
        manual=_points(content, (*MANUAL_75, *MANUAL_50)),
        levels={
            label: value for label, row in levels.items() if (value := _perplexity(content.ours.get(row))) is not None
        },
    )
    figure.tight_layout()
    return png(figure)


def _perplexity(mine: Ours | None) -> float | None:
    return None if mine is None else mine.perplexity.get("c4")


def _points(content: Content, printed: Iterable[Published]) -> _Points:
    """Return average bits and perplexity of ours beside what is printed, where there is both."""
    found: _Points = {}
    for each in printed:
        mine = content.ours.get(each.row or "")
        value = _perplexity(mine)
        if mine is not None and mine.bits is not None and value is not None:
            found[each.label] = (mine.bits, value)
    return found


def _panel(axes: Axes, title: str, *, curve: _Points, manual: _Points, levels: dict[str, float]) -> None:
    if curve:
        axes.plot(*zip(*curve.values(), strict=True), color=_CURVE, marker="o", markersize=4, label="APTQ")
    if manual:
        axes.plot(
            *zip(*manual.values(), strict=True), color=_MANUAL, marker="x", linestyle="", label="manual block-wise"
        )
    for index, (label, value) in enumerate(levels.items()):
        axes.axhline(value, color="#5b6570", linewidth=1.0, linestyle=_STYLES[index % len(_STYLES)], label=label)
    values = [*(value for _, value in (*curve.values(), *manual.values())), *levels.values()]
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
