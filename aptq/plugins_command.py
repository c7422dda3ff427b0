"""``aptq plugins``: which components are installed, from which distribution, and whether they work."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from aptq.config import config_files, plugin_folders
from aptq.registry import TASK, Description, describe, installed, origin

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 when a check failed, else 0."""
    options = _parser().parse_args(argv)
    found = describe(check=options.check)
    if options.check:
        found = [_with_config(each) for each in found]
    found += _config_folders()
    if options.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(each) for each in found], indent=2) + "\n")
    else:
        _show(found)
    return int(any(each.status == "error" for each in found) and options.check)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aptq plugins", description="List the installed components and the distributions they come from."
    )
    parser.add_argument("--check", action="store_true", help="import every component; exit with 1 when one is broken")
    parser.add_argument("--json", action="store_true", help="write JSON to stdout instead of a table")
    return parser


def _with_config(found: Description) -> Description:
    """Add what only a check of the config folders can tell: a component without YAML cannot be chosen by name."""
    if found.status == "error" or found.name in config_files(found.kind):
        return found
    chosen, file = f"{found.kind}={found.name}", f"{found.kind}/{found.name}.yaml"
    if found.kind == TASK:
        chosen, file = f"aptq -cn {found.name}", f"{found.name}.yaml"
    problem = (
        f"{found.kind} {found.name!r} from {found.distribution} {found.version} has no config file: "
        f"{chosen} cannot choose it until its package brings {file}."
    )
    return dataclasses.replace(found, status="error", problem=problem)


def _config_folders() -> list[Description]:
    """Describe the config folders that plug-ins bring."""
    folders = plugin_folders()
    return [
        Description(
            kind="conf",
            name=point.name,
            distribution=point.dist.name if point.dist else "unknown",
            version=point.dist.version if point.dist else "unknown",
            target=point.value,
            status="ok" if point.name in folders else "error",
            problem=""
            if point.name in folders
            else f"{origin(point)} promises configs in a folder that does not exist.",
        )
        for point in sorted(installed("aptq.conf"), key=lambda point: point.name)
    ]


def _show(found: Sequence[Description]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("kind", "name", "distribution", "target", "status"):
        table.add_column(heading, overflow="fold")
    for each in found:
        status = f"[red]{each.status}[/red]" if each.status == "error" else each.status
        table.add_row(each.kind, each.name, f"{each.distribution} {each.version}", each.target, status)
    console = Console()
    console.print(table)
    for each in found:
        if each.problem:
            console.print(f"\n{each.problem}", markup=False, highlight=False)
