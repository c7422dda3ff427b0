"""The report of a run: one HTML page that needs nothing else, and its figures as PNG files."""

from __future__ import annotations

from pathlib import Path

from aptq.files import write_bytes, write_text
from aptq.report import figures
from aptq.report.content import collect
from aptq.report.page import render
from aptq.run import Run

__all__ = ["write_report"]


def write_report(run_folder: Path) -> Path:
    """Write ``report.html``, the PNG figures and ``trade_off.csv`` into a run folder, and return the page's path.

    What a run does not have (perplexity, samples, an end) is left out.

    Raises:
        AptqError: this is no run folder, or one of its files is damaged.
    """
    content = collect(Run.read(run_folder))
    drawn = figures.draw(content)
    for name, data in drawn.items():
        write_bytes(run_folder / name, data, "a figure")
    if content.trade_off is not None:
        lines = ["stored_bits,predicted_cost", *(f"{bits:.6f},{cost!r}" for bits, cost in content.trade_off.curve)]
        write_text(run_folder / "trade_off.csv", "\n".join(lines) + "\n", "the trade-off")
    page = run_folder / "report.html"
    write_text(page, render("aptq.report", run=content, figures=drawn), "the report")
    return page
