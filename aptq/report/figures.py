"""The figures of a report as PNG files, for slides and papers."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from aptq.report.words import duration, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from aptq.report.content import Content, Map
    from aptq.report.sensitivity import Audit, TradeOff

_BLUE = "#2f6fb3"
_RED = "#c2403a"
_GREY = "#777777"
_MAX_LINES = 9  # kinds of layers in one chart


def draw(content: Content) -> dict[str, bytes]:
    """Return the PNG files by name; a figure without data is left out."""
    drawn = {}
    if content.bits is not None:
        drawn["bits.png"] = _heat_map(content.bits)
    if content.errors is not None:
        drawn["errors.png"] = _lines(content.errors)
    if content.trade_off is not None:
        drawn["trade_off.png"] = _trade_off(content.trade_off)
    if content.audit is not None:
        drawn["audit.png"] = _audit(content.audit)
    if content.stages:
        drawn["stages.png"] = _stages(content)
    return drawn


def _heat_map(bits: Map) -> bytes:
    figure = Figure(figsize=(max(6.0, 2.5 + 0.22 * len(bits.depths)), 1.6 + 0.3 * len(bits.kinds)))
    axes = figure.add_subplot()
    grid = [[math.nan if value is None else value for value in row] for row in bits.values]
    low, high = (bits.low, bits.high) if bits.high > bits.low else (bits.low - 1, bits.high + 1)
    image = axes.imshow(grid, aspect="auto", cmap="Blues", vmin=low - 0.25 * (high - low), vmax=high)
    axes.set_yticks(range(len(bits.kinds)), bits.kinds, fontsize=8)
    step = max(1, len(bits.depths) // 16)
    axes.set_xticks(range(0, len(bits.depths), step), [str(depth) for depth in bits.depths[::step]], fontsize=8)
    axes.set_xlabel("block")
    axes.set_title("Bits per layer", loc="left", fontsize=11)
    widths = sorted({value for row in bits.values for value in row if value is not None})
    figure.colorbar(image, ax=axes, label="bits", ticks=widths if len(widths) <= 8 else None)
    return png(figure)


def _lines(errors: Map) -> bytes:
    figure = Figure(figsize=(8.0, 4.2))
    axes = figure.add_subplot()
    for kind, row in list(zip(errors.kinds, errors.values, strict=True))[:_MAX_LINES]:
        points = [(depth, value) for depth, value in zip(errors.depths, row, strict=True) if value]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=kind) if points else None
    if any(value for row in errors.values for value in row):
        axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.set_ylabel("relative error")
    axes.set_title("Relative error of the layers", loc="left", fontsize=11)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return png(figure)


def _trade_off(trade_off: TradeOff) -> bytes:
    figure = Figure(figsize=(7.5, 4.2))
    axes = figure.add_subplot()
    bits, costs = zip(*trade_off.curve, strict=True)
    axes.plot(bits, costs, color=_BLUE, linewidth=1.4, label="best plan for each size")
    points = trade_off.uniform
    axes.scatter(
        [point.bits for point in points],
        [point.cost for point in points],
        color=_GREY,
        label="the same bits everywhere",
        zorder=3,
    )
    for point in points:
        axes.annotate(point.label, (point.bits, point.cost), (5, 5), textcoords="offset points", fontsize=8)
    chosen = trade_off.chosen
    axes.scatter([chosen.bits], [chosen.cost], color=_RED, marker="*", s=130, label="this plan", zorder=4)
    if min(*costs, chosen.cost, *(point.cost for point in points)) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("stored bits per weight")
    axes.set_ylabel("predicted cost")
    axes.set_title("What the bits buy", loc="left", fontsize=11)
    return _plain(figure, axes)


def _audit(audit: Audit) -> bytes:
    figure = Figure(figsize=(5.2, 4.6))
    axes = figure.add_subplot()
    for kind, colour, marker in (("random", _GREY, "o"), ("uniform", _BLUE, "s"), ("chosen", _RED, "*")):
        points = [(predicted, measured) for each, predicted, measured in audit.points if each == kind]
        if points:
            size = 130 if kind == "chosen" else 28
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, color=colour, marker=marker, s=size, label=f"{kind} plan", zorder=3)
    if audit.slope is not None:
        end = max(predicted for _, predicted, _ in audit.points)
        axes.plot([0, end], [0, audit.slope * end], color="#999999", linewidth=1, label=f"slope {audit.slope:.3g}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("predicted cost")
    axes.set_ylabel("measured divergence (nats per token)")
    correlation = "" if audit.spearman is None else f" (Spearman {audit.spearman:.2f})"
    axes.set_title(f"Predicted and measured{correlation}", loc="left", fontsize=11)
    return _plain(figure, axes)


def _plain(figure: Figure, axes: Axes) -> bytes:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return png(figure)


def _stages(content: Content) -> bytes:
    names, seconds = zip(*((stage.name, stage.seconds) for stage in content.stages[::-1]), strict=True)
    figure = Figure(figsize=(7.0, 1.3 + 0.32 * len(names)))
    axes = figure.add_subplot()
    bars = axes.barh(names, seconds, color=_BLUE, height=0.6)
    axes.bar_label(bars, [duration(value) for value in seconds], padding=4, fontsize=8)
    axes.set_xlim(0, max(max(seconds), 1e-9) * 1.2)
    axes.set_xlabel("seconds")
    memory = f"peak memory {size(content.metrics['peak_rss_bytes'])}"
    if content.metrics["peak_device_bytes"] is not None:
        memory += f", on the device {size(content.metrics['peak_device_bytes'])}"
    axes.set_title(f"Time of the stages ({memory})", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    FigureCanvasAgg(figure)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, bbox_inches="tight", facecolor="white")
    return data.getvalue()
