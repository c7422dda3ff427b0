"""Pages that need nothing else: one HTML file from a template, in one style."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from aptq.report import words


def render(package: str, **content: Any) -> str:
    """Return the page that ``template.html`` of a package makes of ``content``; ``style.css`` is there to include."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("aptq.report", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=words.size,
        seconds=words.duration,
        figure=words.figure,
        change=words.change,
        measured=words.measured,
        difference=words.difference,
        share=words.share,
        origin=words.origin,
        base64=lambda data: b64encode(data).decode(),
    )
    return environment.get_template("template.html").render(**content)
