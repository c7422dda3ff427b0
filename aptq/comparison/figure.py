"""Perplexity and scores against stored bits, a curve for each way of getting there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from aptq.api import MEAN_OF_TASKS
from aptq.report.figures import png

if TYPE_CHECKING:
    from aptq.comparison.content import Comparison

_WIDE = 3.0  # a range of more than so many times itself is drawn in logarithms
_TICKS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)  # in each power of ten
_LINE = 80  # characters of a label that a panel is wide enough for


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """What one panel shows: a figure of each run, with its standard error where there is one."""

    title: str
    measure: str
    figures: dict[int, tuple[float, float | None]]  # by the index of the run
    full: float | None  # the original's


def draw(content: Comparison) -> bytes | None:
    """Return a panel for each text, and for the mean of each measure of tasks, as a PNG file; None without any."""
    panels = _panels(content)
    if not panels:
        return None
    names = {row.curve for row in content.rows}
    columns = 1 if max(map(len, names)) > _LINE else len(panels)
    figure = Figure(figsize=(5.6 * len(panels), 4.4 + 0.2 * len(names) / columns), layout="constrained")
    legend: dict[str, Artist] = {}  # the same for all panels: it stands once, below them
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for curve in dict.fromkeys(row.curve for row in content.rows):
            points = [
                (row.storage_bits, *panel.figures[index])
                for index, row in enumerate(content.rows)
                if row.curve == curve and index in panel.figures
            ]
            if points:
                bits, found, errors = zip(*sorted(points, key=lambda point: point[:2]), strict=True)
                known = None if None in errors else errors
                axes.errorbar(bits, found, known, marker="o", markersize=4, linewidth=1.4, label=curve or None)
        values = [value for value, _ in panel.figures.values()]
        if panel.full is not None:
            axes.axhline(panel.full, color="#777777", linewidth=1, linestyle="--", label="full precision")
            values.append(panel.full)
        if min(values) > 0 and max(values) > _WIDE * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=_TICKS))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("stored bits per weight")
        axes.set_ylabel(panel.measure)
        axes.set_title(panel.title, loc="left", fontsize=11)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    if legend:
        handles, labels = list(legend.values()), list(legend)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return png(figure)


def _panels(content: Comparison) -> list[_Panel]:
    panels = [
        _Panel(
            title=text,
            measure="perplexity",
            figures={
                index: (value, None)
                for index, row in enumerate(content.rows)
                if (value := row.perplexity.get(text)) is not None
            },
            full=content.baseline.get(text),
        )
        for text in content.texts
    ]
    for measure, names in content.judged.items():
        for name in names if len(names) == 1 else [each for each in names if each == MEAN_OF_TASKS]:
            found = [row.scores.get(measure, {}).get(name, (None, None)) for row in content.rows]
            panels.append(
                _Panel(
                    title=f"{name} of the tasks" if name == MEAN_OF_TASKS else name,
                    measure=measure,
                    figures={index: (value, error) for index, (value, error) in enumerate(found) if value is not None},
                    full=content.baseline_scores.get(measure, {}).get(name, (None, None))[0],
                )
            )
    return [panel for panel in panels if panel.figures]
