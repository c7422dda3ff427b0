"""Several runs side by side: one page that needs nothing else, and its figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aptq.comparison.content import collect
from aptq.comparison.figure import draw
from aptq.errors import AptqError
from aptq.files import write_bytes, write_text
from aptq.report.page import render
from aptq.run import Run

__all__ = ["write_comparison"]


def write_comparison(run_folders: Sequence[Path], output: Path) -> Path:
    """Write ``comparison.html`` and ``comparison.png`` into a folder, and return the page's path.

    Raises:
        AptqError: there are less than two runs, one is not finished, or its files are damaged.
    """
    if len(run_folders) < 2:
        raise AptqError(f"A comparison needs two runs at least; got {', '.join(map(str, run_folders)) or 'none'}.")
    content = collect([Run.read(folder) for folder in run_folders])
    output.mkdir(parents=True, exist_ok=True)
    figure = draw(content)
    if figure is not None:
        write_bytes(output / "comparison.png", figure, "a figure")
    page = output / "comparison.html"
    write_text(page, render("aptq.comparison", compared=content, figure=figure), "the comparison")
    return page
