"""The report of a run: one HTML page that needs nothing else, and its figures as PNG files."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from aptq.files import write_bytes, write_text
from aptq.report import figures, words
from aptq.report.content import Content, collect
from aptq.run import Run

__all__ = ["write_report"]


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` and the PNG figures from the files of a run folder, and return the page's path.

    What a run does not have (perplexity, samples, an end) is left out.

    Raises:
        AptqError: this is no run folder, or one of its files is damaged.
    """
    content = collect(Run.read(run_folder))
    for name, data in figures.draw(content).items():
        write_bytes(run_folder / name, data, "a figure")
    page = run_folder / "report.html"
    write_text(page, _render(content), "the report")
    return page


def _render(content: Content) -> str:
    environment = Environment(
        loader=PackageLoader("aptq.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=words.size, seconds=words.duration, figure=words.figure, change=words.change, share=words.share
    )
    return environment.get_template("template.html").render(run=content)
