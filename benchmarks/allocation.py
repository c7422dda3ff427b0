"""Whose plan is best: metrics and allocators at equal bits, everything else the same.

    python benchmarks/allocation.py --model smollm2 --calibration C4_TRAIN.jsonl \
        --evaluation c4=C4_VALIDATION.jsonl wikitext2=WIKITEXT2_TEST.txt --budgets 2.5 3 3.5

Each run is a fresh process of the public command line. What is measured for one budget serves the next, so the time of
measuring is that of a row's first budget. Results are added to the JSON record one by one, and runs that it has are not
run again.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import peer_plans
from environments import DEFAULT_CACHE
from tables import as_rich, markdown_table

from runs import Job, add_options, console, footer, full_precision, mean_and_range, run_jobs

HERE = Path(__file__).resolve().parent
UNIFORM = "the same bits everywhere"
AUTOROUND = "AutoRound's own plan"
MODELOPT = "ModelOpt's own plan"
MODELOPT_APART = "ModelOpt's own scores, a width for each layer"
MIXED = "output, integers and AFPQ in one plan"
MIXED_VECTORS = "output, integers, AFPQ and VPTQ in one plan"
_OVERHEAD = 0.297
"""Stored bits a weight beyond 3 bits of code, in groups of 64: a scale in 16 bits and a zero point."""
_PREDICTED = "metric.labels=model"
_KNAPSACK = ["allocator=knapsack", "allocator.bits=[2,3,4,8]"]

ROWS: dict[str, list[str]] = {
    UNIFORM: ["allocator=uniform"],
    "traces, 2 and 4 bits (APTQ)": ["hessian=attention", "metric=trace", "allocator=ratio"],
    "output (default)": [*_KNAPSACK, "metric=output"],
    "output, labels of the prediction": [*_KNAPSACK, "metric=output", _PREDICTED],
    "output, labels of the prediction, 4 samples": [*_KNAPSACK, "metric=output", _PREDICTED, "metric.samples=4"],
    "output, groups of 32, 64 or 128": [
        *("allocator=knapsack", "allocator.bits=[2,3,4]", "metric=output", "metric.samples=4", _PREDICTED),
        *("allocator.group_sizes=[32,64,128]", "allocator.count=storage"),
    ],
    MIXED: [
        *("allocator=knapsack", "allocator.bits=[2,3,4]", "metric=output", "allocator.count=storage", "format=mixed"),
        _PREDICTED,
        *("format.formats.integer.group_size=64", "format.formats.asymmetric_float.group_size=128"),
    ],
    MIXED_VECTORS: [
        *("allocator=knapsack", "allocator.bits=[2,3,4]", "metric=output", "metric.samples=8"),
        *("allocator.count=storage", "format=mixed", "+format@format.formats.vector=vector"),
        *("format.formats.integer.group_size=64", "format.formats.asymmetric_float.group_size=128"),
    ],
    "output, then measured": ["allocator=measured", "allocator.bits=[2,3,4,8]", "metric=output", _PREDICTED],
    "divergence, a layer at a time (ModelOpt's KL score)": [*_KNAPSACK, "metric=divergence", "metric.last_tokens=128"],
    "divergence, fused layers together": [
        *(*_KNAPSACK, "metric=divergence", "metric.last_tokens=128"),
        "fused=true",
    ],
    "output, fused layers together": [*_KNAPSACK, "metric=output", "fused=true"],
    "output, labels of the text (ModelOpt's score)": [*_KNAPSACK, "metric=output", "metric.labels=data"],
    "gradient, absolute (AutoRound's score)": [*_KNAPSACK, "metric=gradient"],
    AUTOROUND: ["plan=..."],  # of AutoScheme in AutoRound's own environment, nothing tuned
    MODELOPT: ["plan=..."],  # of auto_quantize in ModelOpt's own environment
    MODELOPT_APART: ["plan=..."],  # the same, but that layers which it fuses need not share a width
    "gradient, squared": [*_KNAPSACK, "metric=gradient", "metric.form=squared", "metric.labels=model"],
    "error": [*_KNAPSACK, "metric=error"],
    "trace times error (HAWQ-V2)": [*_KNAPSACK, "metric=trace_error"],
    "error, attention and mlp": [*_KNAPSACK, "metric=error", "hessian=attention", "hessian.mlp=true"],
    "error, loss": [*_KNAPSACK, "metric=error", "hessian=loss", "hessian.labels=model"],
}
TRELLIS = "output, trellis-coded"
ROWS[TRELLIS] = ["allocator=knapsack", "allocator.bits=[2,3,4,6]", "metric=output", "format=trellis"]
ROTATED = "Hadamard"
"""The same beside ``transform=hadamard``, which all of such rows have."""
_ROTATED = (
    *(UNIFORM, "output (default)", "output, labels of the text (ModelOpt's score)", "traces, 2 and 4 bits (APTQ)"),
    *("gradient, absolute (AutoRound's score)", AUTOROUND, MODELOPT, MODELOPT_APART, TRELLIS),
)
ROWS |= {f"{row}, {ROTATED}": [*ROWS[row], "transform=hadamard"] for row in _ROTATED}
ROWS[f"{MIXED}, {ROTATED}"] = [*(word for word in ROWS[MIXED] if word != _PREDICTED), "transform=hadamard"]
REFINED = "refined"
"""The same with refinement, the default, which no other row has."""
_REFINED = {f"{row}, {ROTATED}, {REFINED}": ROWS[f"{row}, {ROTATED}"] for row in (UNIFORM, "output (default)", TRELLIS)}
ROWS = {row: [*words, "quantizer.refine=0"] for row, words in ROWS.items()} | _REFINED

_OWN = {
    AUTOROUND: peer_plans.AUTOROUND,
    MODELOPT: peer_plans.MODELOPT,
    MODELOPT_APART: peer_plans.MODELOPT_APART,
}
"""Who makes the plans of a row, and of the same row with rotated inputs."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, HERE / "results" / "allocation")
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3.0, 3.5])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help="default: all")
    parser.add_argument("--audit", type=int, default=0, help="random plans at each row's first budget")
    parser.add_argument("--peers", type=Path, default=DEFAULT_CACHE, help="where peers' environments are kept")
    return parser.parse_args(argv)


def words(row: str, budget: float) -> list[str] | None:
    """Return the overrides of a row at a budget; None where it cannot be kept."""
    if "allocator=uniform" in ROWS[row]:
        return [*ROWS[row], f"allocator.bits={budget:.0f}"] if budget == round(budget) else None
    if "allocator=ratio" in ROWS[row]:
        share = {"allocator.high": 4, "allocator.low": 2, "allocator.ratio": (budget - 2) / 2}
        return [*ROWS[row], *(f"{key}={value:g}" for key, value in share.items())] if 2 < budget < 4 else None
    if "plan=..." in ROWS[row]:
        return ROWS[row]
    if "allocator.count=storage" in ROWS[row]:  # what groups of 64 store with so many bits of code
        return [*ROWS[row], f"allocator.budget={budget + _OVERHEAD:g}"]
    return [*ROWS[row], f"allocator.budget={budget:g}"]


def jobs(options: argparse.Namespace, folder: Path) -> Iterator[Job]:
    """Yield the runs that were asked for; those of one row share what they measure.

    Peers' plans are made in ``folder`` when their turn comes.
    """
    for seed, row in product(options.seeds, options.rows):
        own = _own_plans(options, row, seed, folder) if "plan=..." in ROWS[row] else {}
        for number, budget in enumerate(options.budgets):
            job = words(row, budget)
            if job is None:
                continue
            job = [f"plan={own[budget]}" if word == "plan=..." else word for word in job]
            audited = number == 0 and options.audit and not own and "allocator=uniform" not in ROWS[row]
            audit = [f"audit={options.audit}"] if audited else []
            yield Job(
                row=row,
                fields={"budget": budget},
                words=[
                    *job,
                    *audit,
                    *([] if {"format=mixed", "format=trellis"} & {*job} else ["format.group_size=64"]),
                ],
                overrides=ROWS[row],
                seed=seed,
                baseline=row == UNIFORM,
                cache=f"{list(ROWS).index(row)}-{seed}",
            )


def _own_plans(options: argparse.Namespace, row: str, seed: int, folder: Path) -> dict[float, Path]:
    """Return a peer's plans by budget, but for runs that are on record; rows of one peer and seed share them."""
    if options.json.exists():
        known = json.loads(options.json.read_text(encoding="utf-8"))["results"]
        done = {each["budget"] for each in known if (each["row"], each["seed"]) == (row, seed)}
        if done >= set(options.budgets):
            return dict.fromkeys(options.budgets, folder)  # they are not run again
    peer = _OWN[row.removesuffix(f", {ROTATED}")]
    (place := folder / f"{peer.name}-{seed}").mkdir(exist_ok=True)
    return peer_plans.plans(
        peer,
        model=options.model,
        calibration=options.calibration,
        budgets=options.budgets,
        samples=options.samples,
        length=options.length,
        seed=seed,
        threads=options.threads,
        peers=options.peers,
        folder=place,
    )


def table(record: Mapping[str, Any], budget: float) -> tuple[list[str], list[list[str]]]:
    """Return header and rows at one budget: means over the seeds, and spread."""
    results = [each for each in record["results"] if each["budget"] == budget]
    names = list(results[0]["perplexity"]) if results else []
    rows = []
    for row in ROWS:
        mine = [each for each in results if each["row"] == row]
        if mine:
            cells = [mean_and_range([each["perplexity"][name] for each in mine]) for name in names]
            found = [each["audit"]["spearman"] for each in mine if each["audit"]]
            audits = [each for each in found if each is not None]  # a metric may not tell plans apart
            bits = [f"{mean(each[key] for each in mine):.3f}" for key in ("code_bits", "storage_bits")]
            rows.append([row, str(len(mine)), *bits, *cells, f"{mean(audits):.2f}" if audits else ""])
    for row in (UNIFORM, f"{UNIFORM}, {ROTATED}", f"{UNIFORM}, {ROTATED}, {REFINED}"):
        if between := _interpolated(record, row, budget):
            told = [f"{between[name]:.2f}" for name in names]
            rows.append([f"{row}: between whole widths", "", "", "", *told, ""])
    header = ["", "seeds", "code bits", "stored bits", *(f"{name} ppl" for name in names), "Spearman"]
    return header, rows


def _interpolated(record: Mapping[str, Any], row: str, budget: float) -> dict[str, float]:
    """Return a uniform row's perplexities between whole widths, interpolated on their logarithms."""
    low, high = math.floor(budget), math.ceil(budget)
    ends = [
        [each["perplexity"] for each in record["results"] if each["row"] == row and each["budget"] == bits]
        for bits in (low, high)
    ]
    if low == high or not all(ends):
        return {}
    logs = [{name: mean(math.log(each[name]) for each in end) for name in end[0]} for end in ends]
    return {name: math.exp(logs[0][name] + (budget - low) * (logs[1][name] - logs[0][name])) for name in logs[0]}


def as_markdown(record: Mapping[str, Any]) -> str:
    """Return the page."""
    told = ", ".join(f"{name} {value:.2f}" for name, value in full_precision(record).items())
    parts = [
        "# Plans at equal bits",
        f"{record['model']} in float32, layers at 2, 3, 4 or 8 bits, asymmetric integers, group size 64, "
        f"`quantizer=gptq`; {record['samples']} calibration samples of {record['length']} tokens, perplexity on "
        f"{record['sequences']} sequences of {record['length']} tokens of each text; full precision: {told}. Spearman: "
        "correlation of what the metric predicts with the measured divergence, over random plans. The "
        "rows that name a peer's score in brackets take it with our rounding, so that formulas alone are compared; "
        "AutoRound's own plan is what its AutoScheme chooses (texts of the same file, nothing tuned), ModelOpt's what "
        "its auto_quantize chooses by the gradient (the same samples, its symmetric integers in groups of 64, of which "
        "2 bits tell three levels apart, one width for layers that it fuses, or by its own scores a width for each "
        "layer); all are rounded by our quantizer. "
        "*Hadamard*: everything in that row, scores and rounding, with rotated inputs, except that peers' own plans "
        "are those of the plain rows. *Refined*: with the passes of coordinate descent that are the default; no other "
        "row has them.",
    ]
    for budget in sorted({each["budget"] for each in record["results"]}):
        parts += [f"## {budget:g} bits", markdown_table(*table(record, budget))]
    return "\n\n".join(parts + footer(record, ROWS)) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing from the record, and write the page after every run."""
    options = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        record = run_jobs(options, jobs(options, Path(folder)), as_markdown, "allocation")
    for budget in options.budgets:
        console.print(as_rich(*table(record, budget), title=f"{budget:g} bits"))


if __name__ == "__main__":
    main()
