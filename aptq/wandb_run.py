"""What a finished run hands to Weights & Biases beside its figures: pictures, tables, the report, and files to keep."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

_TABLES = ("layers", "sensitivity")
_KEPT = ("plan.json", "config.yaml", "metrics.json", "audit.json", "layers.csv", "sensitivity.csv", "report.html")


def log_run(run: Any, folder: Path) -> None:
    """Log a finished run's folder to a wandb run.

    ``report/<figure>`` are its pictures and ``report/page`` the whole report; ``tables/layers``,
    ``tables/sensitivity`` and ``tables/continuations`` are tables; the artifact ``<run id>-plan`` of type ``plan`` has
    the plan with what it was made from, so that ``aptq plan=...`` can be given it anywhere. The model is not sent.

    Args:
        run: what ``wandb.init`` gave.
        folder: of the run, with its report.
    """
    import wandb

    logged: dict[str, Any] = {f"report/{path.stem}": wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))}
    if (page := folder / "report.html").exists():
        logged["report/page"] = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
    for name in _TABLES:
        if (path := folder / f"{name}.csv").exists():
            logged[f"tables/{name}"] = _table(path)
    if samples := json.loads((folder / "metrics.json").read_text(encoding="utf-8")).get("samples"):
        rows = [[sample[key] for key in ("prompt", "original", "quantized")] for sample in samples]
        logged["tables/continuations"] = wandb.Table(columns=["prompt", "original", "quantized"], data=rows)
    run.log(logged)
    artifact = wandb.Artifact(f"{run.id}-plan", type="plan")
    for name in _KEPT:
        if (folder / name).exists():
            artifact.add_file(str(folder / name))
    run.log_artifact(artifact)


def _table(path: Path) -> Any:
    """Read a table, numbers as numbers."""
    import wandb

    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    columns: list[str | int] = [*head]
    return wandb.Table(columns=columns, data=[[_value(cell) for cell in row] for row in rows])


def _value(cell: str) -> str | float | None:
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell
