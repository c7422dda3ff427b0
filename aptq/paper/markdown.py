"""The paper's tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aptq.paper.content import Content


def markdown(content: Content) -> str:
    """Return the tables, the settings and the remarks of a paper run."""
    columns = [f"paper: {name}" if index < content.of_the_paper else name for index, name in enumerate(content.columns)]
    parts = [f"# The tables of APTQ (DAC 2024), on {content.model}"]
    parts.append(_table(["", "paper", "here"], content.settings, right=False))
    for table in content.tables:
        parts.append(f"## {table.title}")
        parts.append(_table(["", *columns], [(line.label, *line.cells) for line in table.lines], right=True))
    if content.shares is not None:
        parts.append("## Every share of 4-bit weights, C4 / WikiText-2")
        cells = [
            (share, *(f"**{told}**" if best else told for told, best in line)) for share, line in content.shares.lines
        ]
        parts.append(_table(["", *content.shares.ways], cells, right=True))
    parts.append("## What can be compared")
    parts += content.remarks
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: bool) -> str:
    rule = ["---", *(["---:" if right else "---"] * (len(head) - 1))]
    lines = [head, rule, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
