"""What the command line prints when it is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aptq.benchmark import Result
from aptq.metrics_schema import measures, scored
from aptq.plan import option_labels
from aptq.report.words import difference, measured
from aptq.run import Run


def print_summary(run: Run, report: Path) -> None:
    """Print all measures and size before and after, how both models go on, and where everything is."""
    console = Console()
    metrics = run.metrics()
    table = Table(title="Before and after", title_justify="left")
    for heading in ("", "original", "quantized", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for measure in measures(metrics):
        originals = scored(metrics, measure, original=True)
        for name, (after, error) in scored(metrics, measure).items():
            before, error_before = originals.get(name, (None, None))
            table.add_row(
                f"{measure} on {name}",
                _figure(before, error_before),
                _figure(after, error),
                _change(before, after) if error is None else difference(before, after),
            )
    sizes = metrics["bytes"]
    table.add_row("size (MB)", f"{sizes['original'] / 1e6:.1f}", f"{sizes['model'] / 1e6:.1f}", _times(sizes))
    bits = metrics["bits"]
    table.add_row("bits per quantized weight", "", f"{bits['code']:.2f}", f"{bits['storage']:.2f} with scales")
    console.print(table)
    for line in _plan_lines(run, metrics.get("audit")):
        console.print(line, highlight=False)
    for sample in metrics.get("samples", []):
        console.print(f"\n[dim]{escape(sample['prompt'])}[/]")
        if sample["original"] is not None:
            console.print(f"[bold]original[/]   {escape(sample['original'])}")
        console.print(f"[bold]quantized[/]  {escape(sample['quantized'])}")
    seconds = metrics["seconds"]
    shown = [f"{stage} {value:.0f} s" for stage, value in seconds.items() if value >= 0.5]
    stages = ", ".join(shown) or f"{sum(seconds.values()):.1f} s"
    console.print(f"\nTook {stages}; peak memory {metrics['peak_rss_bytes'] / 1e9:.1f} GB.", highlight=False)
    for what, path in (("Run folder", run.folder), ("Model", run.model_folder), ("Report", report)):
        console.print(f"{what:<11}[bold]{escape(str(path))}[/]", soft_wrap=True, highlight=False)


def _plan_lines(run: Run, audit: Mapping[str, Any] | None) -> list[str]:
    """Say how many layers have which bits, and how far what they were chosen by can be trusted."""
    plan = run.plan()
    lines = []
    if plan is not None and len(set(plan.layers.values())) > 1:
        counts, labels = Counter(plan.layers.values()), option_labels(plan.layers.values())
        lines.append("Plan: " + ", ".join(f"{label} in {counts[each]}" for each, label in labels.items()) + " layers.")
    if audit is not None and audit["spearman"] is not None:
        slope = "" if audit["slope"] is None else f"; measured divergence is {audit['slope']:.2f} times the predicted"
        lines.append(f"Audit: predictions rank plans with a correlation of {audit['spearman']:.2f}{slope}.")
    return lines


def print_measures(found: Mapping[str, Mapping[str, float]], model: str) -> None:
    """Print what an evaluator found, with standard errors where it knows them."""
    table = Table(title=escape(f"Evaluation of {model}"), title_justify="left")
    for heading in ("measure", "text or task", "value"):
        table.add_column(heading, justify="right" if heading == "value" else "left")
    for measure in measures(found):
        for name, (value, error) in scored(found, measure).items():
            table.add_row(measure, name, _figure(value, error))
    Console().print(table)


def print_benchmark(found: Result, folder: Path) -> None:
    """Print a row for each layer and backend, why others were not timed, and where the figures are."""
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width
        console = Console(width=120)
    table = Table(title="Products with packed weights", title_justify="left")
    headings = (
        "shape",
        "rows",
        "bits",
        "group",
        "dtype",
        "backend",
        "ms",
        "middle half",
        "x bf16",
        "error",
        "bandwidth",
    )
    for heading in headings:
        left = heading in ("shape", "dtype", "backend")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for row, spread in zip(found.rows, found.spread, strict=True):
        table.add_row(
            "x".join(map(str, row["shape"])),
            *(str(row[key]) for key in ("rows", "bits", "group_size", "dtype")),
            escape(row["backend"]),
            f"{1e3 * row['seconds']:.3f}",
            f"{1e3 * spread.low:.3f}-{1e3 * spread.high:.3f}",
            f"{row['speedup']:.2f}",
            f"{row['relative_error']:.1e}",
            f"{100 * row['bandwidth_fraction']:.0f} %",
        )
    console.print(table)
    for refusal in found.refusals:
        console.print(f"{refusal.backend} did not run {refusal.case}: {refusal.reason}", highlight=False, markup=False)
    console.print(f"Wrote [bold]{escape(str(folder / 'benchmark.json'))}[/]", soft_wrap=True, highlight=False)


def _figure(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if error is None else measured(value, error)


def _change(before: float | None, after: float | None) -> str:
    return "" if not before or after is None else f"{100 * (after / before - 1):+.1f} %"


def _times(sizes: Mapping[str, int]) -> str:
    return f"{sizes['original'] / sizes['model']:.1f}x smaller"
