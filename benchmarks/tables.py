"""Tables of results, for the terminal and for Markdown pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import machine
from rich.table import Table


def as_rich(header: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    """Return a table for the terminal; all columns but the first are numbers."""
    table = Table(title=title)
    for index, column in enumerate(header):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


def gptq_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the comparison: full precision first, then every result by falling bits."""
    texts = list(record["full_precision_perplexity"])
    header = ["", "bits", "wall s", "quantize s", "CPU s", "peak GB", "file MB", *(f"{text} ppl" for text in texts)]
    full = [f"{record['full_precision_perplexity'][text]:.2f}" for text in texts]
    rows = [["full precision", "32", "", "", "", "", "", *full]]
    for result in record["results"]:
        rows.append(
            [
                result["contestant"],
                str(result["bits"]),
                f"{result['seconds']:.1f}",
                f"{result['quantize_seconds']:.1f}",
                f"{result['cpu_seconds']:.1f}",
                f"{result['peak_rss_bytes'] / 1e9:.2f}",
                f"{result['checkpoint_bytes'] / 1e6:.0f}",
                *(f"{result['perplexity'][text]:.2f}" for text in texts),
            ]
        )
    return header, rows


def gptq_summary(record: dict[str, Any]) -> list[str]:
    """Return a line per width: aptq's share of each peer's time and memory, and whose perplexity is lower."""
    by_key = {(result["contestant"], result["bits"]): result for result in record["results"]}
    lines = []
    for (name, bits), peer in by_key.items():
        ours = by_key.get(("aptq", bits))
        if name == "aptq" or ours is None:
            continue
        better = [text for text, value in peer["perplexity"].items() if ours["perplexity"][text] <= value]
        lines.append(
            f"{bits} bits: aptq takes {ours['seconds'] / peer['seconds']:.2f} of {name}'s wall time and "
            f"{ours['peak_rss_bytes'] / peer['peak_rss_bytes']:.2f} of its peak memory; its perplexity is at least as "
            f"good on {', '.join(better) or 'no text'}."
        )
    return lines


def stage_rows(record: dict[str, Any]) -> list[list[str]]:
    """Return the stages of every contestant's last run, in its own words."""
    rows = []
    for result in record["results"]:
        stages = result["runs"][-1]["stages"]
        rest = result["runs"][-1]["seconds"] - sum(stages.values())
        told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items())
        rows.append([result["contestant"], str(result["bits"]), f"{told}, rest {rest:.1f}"])
    return rows


def as_markdown(
    record: dict[str, Any], header: Sequence[str], rows: Sequence[Sequence[str]], summary: Sequence[str]
) -> str:
    """Return the page with the comparison, the stages, the machine, the versions and the command."""
    paragraphs = [
        "# The same width everywhere, side by side",
        _what(record),
        markdown_table(header, rows),
        "\n".join(f"- {line}" for line in summary),
        _how(record),
        "Stages of the last run, in seconds, as each tells them:",
        markdown_table(["", "bits", "stages"], stage_rows(record)),
        provenance(record),
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def provenance(record: dict[str, Any]) -> str:
    """Return where a record is from: machine, date, commit, versions and command."""
    versions = {"the benchmark's environment": record["versions"]}
    versions.update({result["contestant"]: result["versions"] for result in record["results"] if "versions" in result})
    listed = [
        f"- {who}: " + ", ".join(f"{name} {number}" for name, number in each.items()) for who, each in versions.items()
    ]
    rough = "**The machine was busy with other work: these timings are rough.**\n\n"
    return "\n".join(
        [
            (rough if machine.is_busy(record["machine"]) else "")
            + f"Machine: {machine.sentence(record['machine'])}. Date: {record['date']}, commit {record['commit']}.",
            "",
            *listed,
            "",
            f"```\n{record['command']}\n```",
        ]
    )


def _what(record: dict[str, Any]) -> str:
    job, model = record["job"], record["model"]
    return (
        f"{model['name']} ({model['model_type']}, {model['blocks']} blocks, {model['quantized_weights'] / 1e6:.0f} M "
        f"quantized weights) in float32, asymmetric integers, group size {job['group_size']}, GPTQ with static "
        f"activation order, {job['samples']} calibration samples of {job['length']} tokens, the same ids for all. "
        f"Perplexity of the saved checkpoints by one evaluator, {job['sequences']} sequences of {job['length']} tokens."
    )


def _how(record: dict[str, Any]) -> str:
    return (
        f"Wall, quantize and CPU seconds are medians of {record['repeats']} runs in fresh processes, order "
        f"alternated, {record['threads']} threads each; peak memory is the largest of the runs. Quantize is "
        "calibrating and rounding alone; wall is the whole process, imports and saving included."
    )
