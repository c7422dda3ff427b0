"""Whole runs of the public command line, judged by perplexity: what tables of methods are made of."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
from contestants import hydra_value
from environments import clean_environment
from measured import run_measured
from provenance import commit
from rich.console import Console

console = Console(width=None if Console().is_terminal else 120)


def add_options(parser: argparse.ArgumentParser, results: Path) -> None:
    """Add what all tables of runs ask for; ``results`` is where they go, without a suffix."""
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--evaluation", nargs="+", required=True, metavar="NAME=FILE", help="texts to judge by")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=24, help="of each text, to judge by")
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--untimed", action="store_true", help="the machine does other work: leave times out")
    parser.add_argument("--json", type=Path, default=results.with_suffix(".json"))
    parser.add_argument("--markdown", type=Path, default=results.with_suffix(".md"))


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a table."""

    row: str
    fields: Mapping[str, Any]  # what tells it from others of its row, and is on record: bits or budget
    words: Sequence[str]  # of the command line
    overrides: Sequence[str]  # those of the row, for the record
    seed: int
    baseline: bool  # judge the original too
    cache: str = ""  # jobs with one name share what they measure; none: by itself


def run_jobs(
    options: argparse.Namespace, jobs: Iterable[Job], page: Callable[[Mapping[str, Any]], str], script: str
) -> dict[str, Any]:
    """Run the jobs that the record has not, write record and page after each; return the record."""
    record = open_record(options)
    command = shlex.join(["python", f"benchmarks/{script}.py", *sys.argv[1:]])
    known = [{key: each.get(key) for key in ("row", "seed", "bits", "budget")} for each in record["results"]]
    with tempfile.TemporaryDirectory() as shared:
        for job in jobs:
            if {"bits": None, "budget": None, **job.fields, "row": job.row, "seed": job.seed} in known:
                continue
            with tempfile.TemporaryDirectory() as work:
                cache = Path(shared) / job.cache if job.cache else Path(work) / "cache"
                found = judged_run(
                    options, job.words, seed=job.seed, baseline=job.baseline, work=Path(work), cache=cache
                )
            result = {"row": job.row, "overrides": list(job.overrides), **job.fields, **found}
            record = keep(options, result, command, page)
            figures = ", ".join(f"{name} {value:.2f}" for name, value in result["perplexity"].items())
            told = ", ".join(f"{value:g} {key}" for key, value in job.fields.items())
            console.print(f"{told}, seed {job.seed}, {job.row}: {figures}")
    return record


def judged_run(
    options: argparse.Namespace, words: Sequence[str], *, seed: int, baseline: bool, work: Path, cache: Path
) -> dict[str, Any]:
    """Run one job and return what it took and gave; the run folder stays in ``work / "run"``."""
    texts = ",".join(
        f"{name}:{hydra_value(Path(file))}" for name, file in (each.split("=", 1) for each in options.evaluation)
    )
    settings = {
        "model.path": options.model,
        "data.path": options.calibration,
        "data.num_samples": options.samples,
        "data.sequence_length": options.length,
        "seed": seed,
        "data.seed": seed,
        "evaluator.sequence_length": options.length,
        "evaluator.num_sequences": options.sequences,
        "baseline": baseline,
        "samples": 0,
        "run.dir": work / "run",
        "cache_dir": cache,
    }
    command = [
        *(sys.executable, "-m", "aptq", "fabric=cpu", "data=text"),
        *("transform=none", *words),  # rows that rotate inputs say so
        *(f"{key}={hydra_value(value)}" for key, value in settings.items()),
        f"data.evaluation_path={{{texts}}}",
    ]
    taken = run_measured(command, log=work / "log.txt", env=clean_environment(options.threads, isolated=False))
    metrics = json.loads((work / "run" / "metrics.json").read_text(encoding="utf-8"))
    stages = {stage: round(seconds, 1) for stage, seconds in metrics["seconds"].items()}
    return {
        "seed": seed,
        "perplexity": metrics["perplexity"],
        "full_precision": metrics["baseline_perplexity"],
        "code_bits": metrics["bits"]["code"],
        "storage_bits": metrics["bits"]["storage"],
        "audit": metrics.get("audit"),
        "stages": None if options.untimed else stages,
        "seconds": None if options.untimed else taken.seconds - stages.get("evaluate", 0.0),
        "cpu_seconds": taken.cpu_seconds,
        "peak_rss_bytes": taken.peak_rss_bytes,
        "machine": machine.kind(machine.describe()),
        "commit": commit(),
    }


def open_record(options: argparse.Namespace) -> dict[str, Any]:
    """Return the record so far; stop where it is of another job."""
    record: dict[str, Any] = {"results": []}
    if options.json.exists():
        record = json.loads(options.json.read_text(encoding="utf-8"))
    asked = {"model": Path(options.model).name, "samples": options.samples, "length": options.length}
    asked["sequences"] = options.sequences
    if any(record.setdefault(key, value) != value for key, value in asked.items()):
        raise SystemExit(f"{options.json} is of another job: {asked} was asked for. Give another --json.")
    return record


def keep(
    options: argparse.Namespace,
    result: Mapping[str, Any],
    command: str,
    page: Callable[[Mapping[str, Any]], str],
) -> dict[str, Any]:
    """Add a result to the record on disk, as it is now, and write the page; return the record."""
    record = open_record(options)
    record["results"].append(dict(result))
    record |= {"machine": machine.describe(), "date": f"{datetime.now(UTC):%Y-%m-%d}", "command": command}
    options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    options.markdown.write_text(page(record), encoding="utf-8")
    return record


def full_precision(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the original model's perplexities."""
    return next((each["full_precision"] for each in record["results"] if each["full_precision"]), {})


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def mean_and_range(values: Sequence[float]) -> str:
    """Return the mean, and from where to where the values go if there are several."""
    told = f"{sum(values) / len(values):.2f}"
    return f"{told} ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else told


def footer(record: Mapping[str, Any], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """Return how it was done: overrides by row, machine, date, commits, command."""
    done = {each["row"] for each in record["results"]}
    overrides = [f"- {row}: `{' '.join(words) or 'defaults'}`" for row, words in rows.items() if row in done]
    commits = ", ".join(sorted({each["commit"] for each in record["results"]}))
    known = [each.get("machine") for each in record["results"]]
    told = sorted({machine.kind(record["machine"]), *filter(None, known)})
    earlier = [] if all(known) else ["of rows that do not say, perhaps others"]
    return [
        "## How",
        "\n".join(overrides),
        f"Machines: {'; '.join([*told, *earlier])}. Last run: {record['date']}. Commits: {commits}.",
        f"```\n{record['command']}\n```",
    ]
