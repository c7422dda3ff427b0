"""What each part of the method is worth: one change at a time, every layer at the same width.

    python benchmarks/ablation.py --model smollm2 --calibration C4_TRAIN.jsonl \
        --evaluation c4=C4_VALIDATION.jsonl wikitext2=WIKITEXT2_TEST.txt --bits 3 --seeds 0 1 2

Each run is a fresh process of the public command line; seeds choose the calibration samples and all that is drawn.
Results are added to the JSON record one by one, and runs that it has are not run again, so that rows, widths and seeds
can be asked for bit by bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from tables import as_rich, markdown_table

from runs import Job, add_options, console, footer, full_precision, mean_and_range, mean_of, run_jobs

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
    "gptq, ends of ranges apart": ["format.clip=asymmetric"],
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
_OTHERWISE = ("quantizer.refine=", "quantizer=foem", "quantizer=two_sided", "experiment=")
"""What says how often codes are refined, or cannot be asked to."""
ROWS = {
    row: words if any(word.startswith(_OTHERWISE) for word in words) else [*words, "quantizer.refine=0"]
    for row, words in ROWS.items()
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, HERE / "results" / "ablation")
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help="default: all")
    return parser.parse_args(argv)


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Yield the runs that were asked for."""
    for bits, seed, row in product(options.bits, options.seeds, options.rows):
        words = ["allocator=uniform", *ROWS[row], f"allocator.bits={bits}", "format.group_size=64"]
        yield Job(
            row=row,
            fields={"bits": bits},
            words=words,
            overrides=ROWS[row],
            seed=seed,
            baseline=row == REFERENCE,
        )


def table(record: Mapping[str, Any], bits: int) -> tuple[list[str], list[list[str]]]:
    """Return header and rows at one width: means over the seeds, spread, and shares of the reference's gap."""
    results = [each for each in record["results"] if each["bits"] == bits]
    full = full_precision(record)
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
        cells = [mean_and_range([each["perplexity"][name] for each in mine]) for name in names]
        for name, value in values.items():
            known = REFERENCE in means and name in full
            cells.append(f"{(value - full[name]) / (means[REFERENCE][name] - full[name]):.2f}" if known else "")
        seconds, peak = mean_of(each["seconds"] for each in mine), max(each["peak_rss_bytes"] for each in mine)
        rows.append([row, str(len(mine)), *cells, "" if seconds is None else f"{seconds:.0f}", f"{peak / 1e9:.2f}"])
    return header, rows


def _of(results: Sequence[Mapping[str, Any]], row: str) -> list[Mapping[str, Any]]:
    return [each for each in results if each["row"] == row]


def as_markdown(record: Mapping[str, Any]) -> str:
    """Return the page."""
    full = full_precision(record)
    told = ", ".join(f"{name} {value:.2f}" for name, value in full.items())
    parts = [
        "# One change at a time",
        f"{record['model']} in float32, every layer at the same width, asymmetric integers, group size 64, "
        f"{record['samples']} calibration samples of {record['length']} tokens, perplexity on {record['sequences']} "
        f"sequences of {record['length']} tokens of each text; full precision: {told}. A gap is the distance to full "
        f"precision as a share of that of *{REFERENCE}*, both means over their seeds: rows with other numbers of seeds "
        "compare roughly. Rows without *min-max* search group ranges; only *refined* ones refine. Seconds are the "
        "whole process but for judging, "
        "and of runs that had the machine for themselves; "
        f"peak memory is that of judging, of two models in the rows of *{REFERENCE}*.",
    ]
    for bits in sorted({each["bits"] for each in record["results"]}):
        parts += [f"## {bits} bits", markdown_table(*table(record, bits))]
    return "\n\n".join(parts + footer(record, ROWS)) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing from the record, and write the page after every run."""
    options = parse(argv)
    record = run_jobs(options, jobs(options), as_markdown, "ablation")
    for bits in options.bits:
        console.print(as_rich(*table(record, bits), title=f"{bits} bits"))


if __name__ == "__main__":
    main()
