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
    """Write ``report.html`` and the PNG figures from the files of a run folder, and return the page's path.

    What a run does not have (perplexity, samples, an end) is left out.

    Raises:
        AptqError: this is no run folder, or one of its files is damaged.
    """
    content = collect(Run.read(run_folder))
    drawn = figures.draw(content)
    for name, data in drawn.items():
        write_bytes(run_folder / name, data, "a figure")
    page = run_folder / "report.html"
    write_text(page, render("aptq.report", run=content, figures=drawn), "the report")
    return page
