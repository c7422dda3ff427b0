"""What each part of the method is worth: one change at a time, every layer at the same width.

    python benchmarks/ablation.py --model smollm2 --calibration C4_TRAIN.jsonl \
        --evaluation c4=C4_VALIDATION.jsonl wikitext2=WIKITEXT2_TEST.txt --bits 3 --seeds 0 1 2

Each run is a fresh process of the public command line; seeds choose the calibration samples and all that is drawn.
Results are added to the JSON record one by one, and runs that it has are not run again, so that rows, widths and seeds
can be asked for bit by bit.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import machine
from contestants import hydra_value
from environments import clean_environment
from measured import run_measured
from provenance import commit
from rich.console import Console
from tables import as_rich, markdown_table

HERE = Path(__file__).resolve().parent
REFERENCE = "gptq, min-max"
"""The strong GPTQ of the literature: activation order, static groups; what gaps to full precision are compared with."""

ROWS: dict[str, list[str]] = {
    "nearest, min-max": ["experiment=rtn_4"],
    REFERENCE: ["experiment=gptq_4"],
    "attention, min-max": ["experiment=gptq_4", "hessian=attention", "hessian.probes=2"],
    "gptq, damping 0.01 of the mean": ["quantizer.damping=0.01", "quantizer.damping_scale=mean"],
    "gptq, damping 0.1 of the mean": ["quantizer.damping=0.1", "quantizer.damping_scale=mean"],
    "gptq, damping 0.05": ["quantizer.damping=0.05"],
    "gptq": [],
    "gptq, damping 0.3": ["quantizer.damping=0.3"],
    "gptq, refined": ["quantizer.refine=3"],
    "foem": ["quantizer=foem"],
    "gptaq": ["quantizer=gptaq"],
    "gptaq, alpha 0.5": ["quantizer=gptaq", "quantizer.alpha=0.5"],
    "gptq, stale prefix": ["prefix=full_precision"],
    "attention": ["hessian=attention"],
    "attention, ones": ["hessian=attention", "hessian.cotangent=ones"],
    "attention, one Hessian a layer": ["hessian=attention", "hessian.scope=layer"],
    "attention, two probes": ["hessian=attention", "hessian.probes=2"],
    "attention, random values": ["hessian=attention", "hessian.values=random"],
    "attention, two-sided": ["hessian=attention", "quantizer=two_sided"],
    "attention, mlp": ["hessian=attention", "hessian.mlp=true"],
    "attention, mlp, two-sided": [
        "hessian=attention",
        "hessian.mlp=true",
        "hessian.probes=2",
        "quantizer=two_sided",
    ],
    "attention, mlp, loss": ["hessian=attention", "hessian.mlp=true", "hessian.tokens=loss"],
    "attention, refined": ["hessian=attention", "quantizer.refine=3"],
    "attention, mlp, refined": ["hessian=attention", "hessian.mlp=true", "quantizer.refine=3"],
    "loss, one group": ["hessian=loss", "hessian.groups=1"],
    "loss": ["hessian=loss"],
    "loss, refined": ["hessian=loss", "quantizer.refine=3"],
}

console = Console(width=None if Console().is_terminal else 120)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--evaluation", nargs="+", required=True, metavar="NAME=FILE", help="texts to judge by")
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help="default: all")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=24, help="of each text, to judge by")
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--json", type=Path, default=HERE / "results" / "ablation.json")
    parser.add_argument("--markdown", type=Path, default=HERE / "results" / "ablation.md")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace, row: str, bits: int, seed: int, work: Path) -> dict[str, Any]:
    """Run one job and return what it took and gave."""
    texts = ",".join(
        f"{name}:{hydra_value(Path(file))}" for name, file in (each.split("=", 1) for each in options.evaluation)
    )
    settings = {
        "model.path": options.model,
        "data.path": options.calibration,
        "data.num_samples": options.samples,
        "data.sequence_length": options.length,
        "allocator.bits": bits,
        "format.group_size": 64,
        "seed": seed,
        "data.seed": seed,
        "evaluator.sequence_length": options.length,
        "evaluator.num_sequences": options.sequences,
        "baseline": row == REFERENCE,
        "samples": 0,
        "run.dir": work / "run",
        "cache_dir": work / "cache",
    }
    command = [
        *(sys.executable, "-m", "aptq", "fabric=cpu", "data=text", "allocator=uniform", *ROWS[row]),
        *(f"{key}={hydra_value(value)}" for key, value in settings.items()),
        f"data.evaluation_path={{{texts}}}",
    ]
    taken = run_measured(command, log=work / "log.txt", env=clean_environment(options.threads, isolated=False))
    metrics = json.loads((work / "run" / "metrics.json").read_text(encoding="utf-8"))
    stages = {stage: round(seconds, 1) for stage, seconds in metrics["seconds"].items()}
    return {
        "row": row,
        "overrides": ROWS[row],
        "bits": bits,
        "seed": seed,
        "perplexity": metrics["perplexity"],
        "full_precision": metrics["baseline_perplexity"],
        "stages": stages,
        "seconds": taken.seconds - stages.get("evaluate", 0.0),
        "peak_rss_bytes": taken.peak_rss_bytes,
        "commit": commit(),
    }


def table(record: Mapping[str, Any], bits: int) -> tuple[list[str], list[list[str]]]:
    """Return header and rows at one width: means over the seeds, spread, and shares of the reference's gap."""
    results = [each for each in record["results"] if each["bits"] == bits]
    full = _full_precision(record)
    names = list(results[0]["perplexity"]) if results else []
    header = ["", "seeds", *(f"{name} ppl" for name in names), *(f"gap {name}" for name in names), "s", "peak GB"]
    means = {
        row: {name: mean(each["perplexity"][name] for each in _of(results, row)) for name in names}
        for row in ROWS
        if _of(results, row)
    }
    rows = []
    for row, values in means.items():
        mine = _of(results, row)
        cells = []
        for name, value in values.items():
            spread = [each["perplexity"][name] for each in mine]
            cells.append(f"{value:.2f}" + (f" ({min(spread):.2f} to {max(spread):.2f})" if len(mine) > 1 else ""))
        for name, value in values.items():
            known = REFERENCE in means and name in full
            cells.append(f"{(value - full[name]) / (means[REFERENCE][name] - full[name]):.2f}" if known else "")
        seconds, peak = mean(each["seconds"] for each in mine), max(each["peak_rss_bytes"] for each in mine)
        rows.append([row, str(len(mine)), *cells, f"{seconds:.0f}", f"{peak / 1e9:.2f}"])
    return header, rows


def _full_precision(record: Mapping[str, Any]) -> dict[str, float]:
    return next((each["full_precision"] for each in record["results"] if each["full_precision"]), {})


def _of(results: Sequence[Mapping[str, Any]], row: str) -> list[Mapping[str, Any]]:
    return [each for each in results if each["row"] == row]


def as_markdown(record: Mapping[str, Any]) -> str:
    """Return the page."""
    full = _full_precision(record)
    told = ", ".join(f"{name} {value:.2f}" for name, value in full.items())
    parts = [
        "# One change at a time",
        f"{record['model']} in float32, every layer at the same width, asymmetric integers, group size 64, "
        f"{record['samples']} calibration samples of {record['length']} tokens, perplexity on {record['sequences']} "
        f"sequences of {record['length']} tokens of each text; full precision: {told}. A gap is the distance to full "
        f"precision as a share of that of *{REFERENCE}*, both means over their seeds: rows with other numbers of seeds "
        "compare roughly. Rows without *min-max* search group ranges. Seconds are the whole process but for judging; "
        f"peak memory is that of judging, of two models in the rows of *{REFERENCE}*.",
    ]
    for bits in sorted({each["bits"] for each in record["results"]}):
        parts += [f"## {bits} bits", markdown_table(*table(record, bits))]
    overrides = [f"- {row}: `{' '.join(ROWS[row]) or 'defaults'}`" for row in ROWS if _of(record["results"], row)]
    commits = ", ".join(sorted({each["commit"] for each in record["results"]}))
    parts += [
        "## How",
        "\n".join(overrides),
        f"Machine: {machine.sentence(record['machine'])}. Date: {record['date']}. Commits: {commits}.",
        f"```\n{record['command']}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing from the record, and write the page after every run."""
    options = parse(argv)
    record: dict[str, Any] = {"results": []}
    if options.json.exists():
        record = json.loads(options.json.read_text(encoding="utf-8"))
    asked = {"model": Path(options.model).name, "samples": options.samples, "length": options.length}
    asked["sequences"] = options.sequences
    if any(record.setdefault(key, value) != value for key, value in asked.items()):
        raise SystemExit(f"{options.json} is of another job: {asked} was asked for. Give another --json.")
    known = {(each["row"], each["bits"], each["seed"]) for each in record["results"]}
    for bits in options.bits:
        for seed in options.seeds:
            for row in options.rows:
                if (row, bits, seed) in known:
                    continue
                with tempfile.TemporaryDirectory() as work:
                    result = measure(options, row, bits, seed, Path(work))
                record["results"].append(result)
                record |= {"machine": machine.describe(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
                record["command"] = shlex.join(["python", "benchmarks/ablation.py", *(argv or sys.argv[1:])])
                options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                options.markdown.write_text(as_markdown(record), encoding="utf-8")
                figures = ", ".join(f"{name} {value:.2f}" for name, value in result["perplexity"].items())
                console.print(f"{bits} bits, seed {seed}, {row}: {figures}, {result['seconds']:.0f} s")
    for bits in options.bits:
        console.print(as_rich(*table(record, bits), title=f"{bits} bits"))


if __name__ == "__main__":
    main()
