"""Perplexity against stored bits, a curve for each way of getting there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from aptq.report.figures import png

if TYPE_CHECKING:
    from aptq.comparison.content import Comparison

_WIDE = 3.0  # a range of more than so many times itself is drawn in logarithms
_TICKS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)  # in each power of ten
_LINE = 80  # characters of a label that a panel is wide enough for


def draw(content: Comparison) -> bytes | None:
    """Return a panel for each text as a PNG file; None where nothing was judged."""
    texts = [text for text in content.texts if content.best(text) is not None]
    if not texts:
        return None
    names = {row.curve for row in content.rows}
    columns = 1 if max(map(len, names)) > _LINE else len(texts)
    figure = Figure(figsize=(5.6 * len(texts), 4.4 + 0.2 * len(names) / columns), layout="constrained")
    legend: dict[str, Artist] = {}  # the same for all panels: it stands once, below them
    for panel, text in zip(figure.subplots(1, len(texts), squeeze=False)[0], texts, strict=True):
        values: list[float] = []
        for curve in dict.fromkeys(row.curve for row in content.rows):
            points = [
                (row.storage_bits, value)
                for row in content.rows
                if row.curve == curve and (value := row.perplexity.get(text)) is not None
            ]
            if points:
                bits, found = zip(*sorted(points), strict=True)
                panel.plot(bits, found, marker="o", markersize=4, linewidth=1.4, label=curve or None)
                values += found
        if (full := content.baseline.get(text)) is not None:
            panel.axhline(full, color="#777777", linewidth=1, linestyle="--", label="full precision")
            values.append(full)
        if max(values) > _WIDE * min(values):
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=_TICKS))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_locator(NullLocator())
        panel.set_xlabel("stored bits per weight")
        panel.set_ylabel("perplexity")
        panel.set_title(text, loc="left", fontsize=11)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        handles, labels = panel.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    if legend:
        handles, labels = list(legend.values()), list(legend)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return png(figure)
