"""The paper's tables and its figure, on any model: runs in a row, and a page that sets them beside what is printed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from aptq.files import write_bytes, write_text
from aptq.paper.content import collect
from aptq.paper.figure import draw
from aptq.paper.markdown import markdown
from aptq.report.page import render
from aptq.run import Run

__all__ = ["write_paper"]


def write_paper(folder: Path, rows: Mapping[str, Path]) -> Path:
    """Write ``tables.md``, ``figure2.png`` and ``report.html`` into ``folder``, and return the page's path.

    Args:
        folder: of the paper run.
        rows: run folders by the name of the row (``aptq_75``); each finished, and judged on ``c4`` and ``wikitext2``.

    Raises:
        AptqError: a row is no finished run.
    """
    content = collect({name: Run.read(path) for name, path in rows.items()})
    figure = draw(content)
    write_text(folder / "tables.md", markdown(content), "the tables")
    write_bytes(folder / "figure2.png", figure, "figure 2")
    page = folder / "report.html"
    write_text(page, render("aptq.paper", paper=content, figure=figure), "the report")
    return page
