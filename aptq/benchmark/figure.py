"""The benchmark's figure: how much faster than the dense product, by the number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from aptq.report.figures import png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_PANELS = 6


def draw(rows: Sequence[dict[str, Any]]) -> bytes:
    """Return a PNG file with a panel for each shape (the first ones), a curve for each backend, bits and dtype."""
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))[:_MOST_PANELS]
    figure = Figure(figsize=(5.5 * max(1, len(shapes)), 4.2))
    for place, shape in enumerate(shapes):
        axes = figure.add_subplot(1, len(shapes), place + 1)
        _panel(axes, [row for row in rows if tuple(row["shape"]) == shape])
        axes.set_title(f"{shape[0]} x {shape[1]}")
    figure.tight_layout()
    return png(figure)


def _panel(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        group = "" if row["group_size"] == -1 else f", g{row['group_size']}"
        label = f"{row['backend']}, {row['bits']} bits{group}, {row['dtype']}"
        curves.setdefault(label, []).append((row["rows"], row["speedup"]))
    for label, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, linewidth=1.2, label=label)
    axes.axhline(1.0, color="#777777", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("rows of activations")
    axes.set_ylabel("speed-up over the dense bfloat16 product")
    axes.legend(fontsize=6)
