"""The losses of a training, as a table and as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from aptq.report.figures import png

_SMOOTHED = 0.1  # share of the steps that a point of the smooth line is the mean of


def table(history: Sequence[Mapping[str, float]]) -> str:
    """Return the history as CSV, a row a step."""
    rows = [f"{row['step']:.0f},{row['loss']!r},{row['learning_rate']!r}" for row in history]
    return "\n".join(["step,loss,learning_rate", *rows]) + "\n"


def draw(history: Sequence[Mapping[str, float]], title: str) -> bytes:
    """Return the loss of every step, and its running mean, as a PNG."""
    steps, losses = [row["step"] for row in history], [row["loss"] for row in history]
    width = max(1, round(_SMOOTHED * len(losses)))
    means = [sum(losses[max(0, at - width + 1) : at + 1]) / min(width, at + 1) for at in range(len(losses))]
    figure = Figure(figsize=(7.0, 3.8))
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9bbcdd", linewidth=0.8, label="step")
    axes.plot(steps, means, color="#2f6fb3", linewidth=1.6, label=f"mean of {width} steps")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return png(figure)
