"""The same width everywhere, side by side: aptq and its peers on the same model, samples, bits, dtype and threads.

    python benchmarks/gptq_peers.py --model smollm2 --calibration c4/calibration.jsonl \\
        --evaluation c4=c4/validation.jsonl wikitext2=wikitext2/test.txt

Every job runs in a fresh process, the peer in a virtual environment of its own, made on the first run. The order
alternates over repeats. One judge reads the checkpoints that the contestants saved and measures all of them in the
same model on the same windows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
from contestants import Aptq, Contestant, Job, Stages, peers
from environments import DEFAULT_CACHE, clean_environment
from measured import Measurement, run_measured
from provenance import commit
from rich.console import Console
from tables import as_markdown, as_rich, gptq_rows, gptq_summary

HERE = Path(__file__).resolve().parent
console = Console(width=None if Console().is_terminal else 120)


@dataclass
class Result:
    """All that is known of one contestant at one width."""

    contestant: str
    bits: int
    runs: list[Measurement] = field(default_factory=list)
    stages: list[Stages] = field(default_factory=list)
    checkpoint_bytes: int = 0
    perplexity: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A name for files."""
        return f"{self.contestant}-{self.bits}"

    def record(self) -> dict[str, Any]:
        """Return plain data: medians first, then every run."""
        return {
            "contestant": self.contestant,
            "bits": self.bits,
            "seconds": statistics.median(run.seconds for run in self.runs),
            "quantize_seconds": statistics.median(stage.quantize for stage in self.stages),
            "cpu_seconds": statistics.median(run.cpu_seconds for run in self.runs),
            "peak_rss_bytes": max(run.peak_rss_bytes for run in self.runs),
            "checkpoint_bytes": self.checkpoint_bytes,
            "perplexity": self.perplexity,
            "versions": dict(self.stages[-1].versions),
            "runs": [
                {**asdict(run), "stages": dict(stage.seconds)}
                for run, stage in zip(self.runs, self.stages, strict=True)
            ],
        }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder, hub id or smollm2 (default)")
    parser.add_argument("--calibration", type=Path, required=True, help=".jsonl, .txt or .parquet")
    parser.add_argument("--evaluation", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--bits", default="4,3,2", help="widths, separated by commas (default: 4,3,2)")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample and of an evaluation window")
    parser.add_argument("--sequences", type=int, default=12, help="evaluation windows of each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=machine.usable_cores(), help="of every contestant")
    parser.add_argument(
        "--contestants",
        nargs="+",
        default=["aptq", "llm-compressor"],
        choices=["aptq", *(peer.name for peer in peers())],
        help="who takes part (default: aptq llm-compressor); auto-round takes hours on a CPU",
    )
    parser.add_argument("--override", nargs="*", default=[], help="further overrides of aptq's config")
    parser.add_argument("--work", type=Path, help="folder for models and logs, kept (default: a temporary one)")
    parser.add_argument("--environments", type=Path, default=DEFAULT_CACHE, help="where peers are installed")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--markdown", type=Path, default=HERE / "results" / "gptq_peers.md")
    options = parser.parse_args(argv)
    for peer in peers():
        if peer.name in options.contestants and (lost := {*peer.unreadable} & {*map(int, options.bits.split(","))}):
            parser.error(f"{peer.name} cannot read back what it saves at {lost} bits here; choose other --bits")
    return options


def prepare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Write the model and the token ids that all share; return the model's shape."""
    command = [
        *(sys.executable, str(HERE / "prepare.py")),
        *(f"--model={options.model}", f"--calibration={options.calibration.resolve()}"),
        *(f"--samples={options.samples}", f"--length={options.length}", f"--seed={options.seed}"),
        *(f"--folder={work / 'model'}", f"--tokens={work / 'tokens.safetensors'}", f"--record={work / 'shape.json'}"),
    ]
    run_measured(command, log=work / "prepare.log", env=dict(os.environ))
    shape: dict[str, Any] = json.loads((work / "shape.json").read_text(encoding="utf-8"))
    return shape


def race(contestants: Sequence[Contestant], jobs: Sequence[Job], repeats: int, work: Path) -> list[Result]:
    """Run every job of every contestant ``repeats`` times, turning the order round each time."""
    results = {
        (contestant.name, job.bits): Result(contestant.name, job.bits) for job in jobs for contestant in contestants
    }
    for repeat in range(repeats):
        for job in jobs:
            for contestant in contestants[:: 1 if repeat % 2 == 0 else -1]:
                result = results[contestant.name, job.bits]
                folder = work / result.key / str(repeat)
                folder.mkdir(parents=True)
                run = run_measured(
                    contestant.quantize(job, folder),
                    log=folder / "log.txt",
                    env=clean_environment(job.threads, isolated=contestant.isolated),
                    cwd=folder if contestant.isolated else None,
                )
                result.runs.append(run)
                result.stages.append(contestant.stages(folder))
                files = contestant.checkpoint(folder).glob("*.safetensors")
                result.checkpoint_bytes = sum(file.stat().st_size for file in files)
                console.print(
                    f"{contestant.name:>15} {job.bits} bits, run {repeat + 1}/{repeats}: {run.seconds:6.1f} s, "
                    f"{run.peak_rss_bytes / 1e9:.2f} GB"
                )
    return list(results.values())


def judge(
    contestants: Sequence[Contestant], results: Sequence[Result], options: argparse.Namespace, work: Path
) -> dict[str, float]:
    """Fill in the perplexity of every result (its first run); return that of the full-precision model."""
    by_name = {contestant.name: contestant for contestant in contestants}
    todo = []
    for result in results:
        contestant, dense = by_name[result.contestant], work / f"{result.key}.safetensors"
        command = contestant.dump(work / result.key / "0", dense)
        environment = clean_environment(options.threads, isolated=contestant.isolated)
        run_measured(command, log=work / f"{result.key}-dump.log", env=environment)
        todo.append({"key": result.key, "bits": result.bits, "file": str(dense)})
    listing, output = work / "results.json", work / "perplexity.json"
    listing.write_text(json.dumps(todo), encoding="utf-8")
    texts = dict(entry.split("=", 1) for entry in options.evaluation)
    command = [
        *(sys.executable, str(HERE / "judge.py")),
        *(f"--model={work / 'model'}", f"--evaluation={json.dumps(texts)}", f"--sequences={options.sequences}"),
        *(f"--length={options.length}", f"--group-size={options.group_size}"),
        *(f"--results={listing}", f"--output={output}"),
    ]
    run_measured(command, log=work / "judge.log", env=dict(os.environ))
    perplexities: dict[str, dict[str, float]] = json.loads(output.read_text(encoding="utf-8"))
    for result in results:
        result.perplexity = perplexities[result.key]
    return perplexities["full"]


@contextlib.contextmanager
def work_folder(chosen: Path | None) -> Iterator[Path]:
    """Give the chosen folder, which must be empty and is kept, or a temporary one."""
    if chosen is None:
        with tempfile.TemporaryDirectory(prefix="gptq_peers_") as folder:
            yield Path(folder)
        return
    chosen.mkdir(parents=True, exist_ok=True)
    if any(chosen.iterdir()):
        sys.exit(f"--work {chosen} is not empty; name a new folder")
    yield chosen.resolve()


def main() -> None:
    """Run the comparison and write its tables."""
    options = parse()
    described = machine.describe()
    if machine.is_busy(described):
        console.print("[yellow]The machine is busy with something else: timings will be rough.[/]")
    known: dict[str, Contestant] = {each.name: each for each in (Aptq(overrides=options.override), *peers())}
    contestants = [known[name] for name in options.contestants]
    with work_folder(options.work) as work:
        console.print("Preparing the model, the samples and the environments ...")
        shape = prepare(options, work)
        for contestant in contestants:
            contestant.prepare(options.environments)
        jobs = [
            Job(
                model=work / "model",
                calibration=options.calibration.resolve(),
                tokens=work / "tokens.safetensors",
                samples=options.samples,
                length=options.length,
                seed=options.seed,
                bits=bits,
                group_size=options.group_size,
                threads=options.threads,
            )
            for bits in map(int, options.bits.split(","))
        ]
        results = race(contestants, jobs, options.repeats, work)
        full = judge(contestants, results, options, work)
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": command_line(options),
        "commit": commit(),
        "machine": described,
        "versions": machine.versions(),
        "model": {"name": Path(options.model).name, **shape},
        "job": {name: getattr(options, name) for name in ("group_size", "samples", "length", "sequences", "seed")},
        "threads": options.threads,
        "repeats": options.repeats,
        "full_precision_perplexity": full,
        "results": [result.record() for result in results],
    }
    write(record, options)


def command_line(options: argparse.Namespace) -> str:
    """Return the command that repeats this run, with file names for paths: folders differ between machines."""
    texts = " ".join(f"{name}={Path(file).name}" for name, _, file in (e.partition("=") for e in options.evaluation))
    return (
        f"python benchmarks/gptq_peers.py --model {Path(options.model).name} --calibration {options.calibration.name} "
        f"--evaluation {texts} --bits {options.bits} --group-size {options.group_size} --samples {options.samples} "
        f"--length {options.length} --sequences {options.sequences} --seed {options.seed} --repeats {options.repeats} "
        f"--threads {options.threads} --contestants {' '.join(options.contestants)}"
        + "".join(f" --override {override}" for override in options.override)
    )


def write(record: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the table; write the JSON and the Markdown page."""
    header, rows = gptq_rows(record)
    console.print(as_rich(header, rows, title="The same width everywhere, side by side"))
    for line in gptq_summary(record):
        console.print(line)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    options.markdown.parent.mkdir(parents=True, exist_ok=True)
    options.markdown.write_text(as_markdown(record, header, rows, gptq_summary(record)), encoding="utf-8")
    console.print(f"Wrote {options.markdown}")


if __name__ == "__main__":
    main()
