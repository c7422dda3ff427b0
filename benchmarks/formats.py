"""The league table of formats: every format under every quantizer, every layer at the same width.

    python benchmarks/formats.py --model smollm2 --calibration C4_TRAIN.jsonl \
        --evaluation c4=C4_VALIDATION.jsonl wikitext2=WIKITEXT2_TEST.txt --bits 2 3 4

Each run is a fresh process of the public command line. Results are added to the JSON record one by one, and runs that
it has are not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from tables import as_rich, markdown_table

from runs import Job, add_options, console, footer, full_precision, mean_and_range, mean_of, run_jobs

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Family:
    """A format of the table: overrides, the bits that there are, and the section that its groups and ranges are in."""

    words: Sequence[str]
    bits: Sequence[int]
    ranges: str | None = "format"  # None: it has groups of its own, and no row without a search for ranges

    @property
    def groups(self) -> list[str]:
        """Return what sets groups of 64."""
        return [] if self.ranges is None else [f"{self.ranges}.group_size=64"]


FORMATS = {
    "integer": Family(words=["format=integer"], bits=range(2, 9)),
    "integer, symmetric": Family(words=["format=integer", "format.symmetric=true"], bits=range(2, 9)),
    "integer, all pairs of ends (BitDistiller)": Family(
        words=["format=integer", "format.clip=joint"], bits=range(2, 9)
    ),
    "integer, factors of channels (AWQ)": Family(words=["format=scaled"], bits=range(2, 9), ranges="format.inner"),
    "integer, 0.5 % of outliers (SpQR, GWQ)": Family(
        words=["format=outliers"], bits=range(2, 9), ranges="format.inner"
    ),
    "integer, bits by groups (SliM-LLM)": Family(words=["format=group_bits"], bits=range(2, 8), ranges="format.inner"),
    "integer, bits by groups of like salience": Family(
        words=["format=group_bits", "format.grouping=salience"], bits=range(2, 8), ranges="format.inner"
    ),
    "normal float": Family(words=["format=float"], bits=(1, 2, 3, 4)),
    "normal float, two scales (AFPQ)": Family(words=["format=asymmetric_float"], bits=(1, 2, 3, 4)),
    "normal float, two scales, 0.5 % of outliers": Family(
        words=["format=outliers", "format@format.inner=asymmetric_float"], bits=(2, 3, 4), ranges="format.inner"
    ),
    "floating point": Family(words=["format=float", "format.code=fp"], bits=(3, 4)),
    "floating point, two scales (AFPQ)": Family(words=["format=asymmetric_float", "format.code=fp"], bits=(3, 4)),
    "binary (BiLLM)": Family(words=["format=binary"], bits=(1, 2), ranges=None),
    "binary, groups and scales as published (BiLLM)": Family(
        words=[
            "format=binary",
            "format.group_size=128",
            "format.salient=0.1",
            "format.salient_scales=two_pass",
            "format.centre=true",
        ],
        bits=(1, 2),
        ranges=None,
    ),
    "trellis (QTIP, EXL3)": Family(words=["format=trellis"], bits=range(1, 7), ranges=None),
    "vector codebooks (VPTQ)": Family(words=["format=vector"], bits=(1, 2, 3, 4), ranges=None),
    "vector codebooks, fitted to codes (VPTQ)": Family(
        words=["format=vector", "format.finetune=2"], bits=(1, 2, 3, 4), ranges=None
    ),
    "block codebooks (LO-BCQ)": Family(words=["format=block_clustered"], bits=(4,), ranges=None),
    "NVFP4": Family(words=["format=nvfp4", "format.clip_steps=8"], bits=(4,), ranges=None),
    "MXFP4": Family(words=["format=mxfp4", "format.clip_steps=8"], bits=(4,), ranges=None),
}
ROTATED = "Hadamard"
_ROTATED = (
    "integer",
    "integer, 0.5 % of outliers (SpQR, GWQ)",
    "integer, bits by groups of like salience",
    "normal float",
    "normal float, two scales (AFPQ)",
    "normal float, two scales, 0.5 % of outliers",
    "binary (BiLLM)",
    "trellis (QTIP, EXL3)",
    "vector codebooks (VPTQ)",
    "vector codebooks, fitted to codes (VPTQ)",
    "block codebooks (LO-BCQ)",
    "NVFP4",
    "MXFP4",
)
FORMATS |= {
    f"{name}, {ROTATED}": replace(FORMATS[name], words=[*FORMATS[name].words, "transform=hadamard"])
    for name in _ROTATED
}
QUANTIZERS: dict[str, list[str]] = {
    "nearest, min-max": ["hessian=identity", "quantizer=nearest"],
    "nearest": ["hessian=input", "quantizer=nearest"],
    "gptq, min-max": ["hessian=input", "quantizer=gptq", "quantizer.refine=0"],
    "gptq": ["hessian=input", "quantizer=gptq", "quantizer.refine=0"],
    "gptq, refined": ["hessian=input", "quantizer=gptq", "quantizer.refine=3"],
}


def _overrides(family: Family, quantizer: str) -> list[str]:
    fixed = [f"{family.ranges}.clip_steps=0"] if "min-max" in quantizer else []
    return [*family.words, *QUANTIZERS[quantizer], *fixed]


ROWS = {
    f"{name}: {quantizer}": _overrides(family, quantizer)
    for (name, family), quantizer in product(FORMATS.items(), QUANTIZERS)
    if family.ranges is not None or "min-max" not in quantizer
}
_FIRST = next(iter(ROWS))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, HERE / "results" / "formats")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=list(QUANTIZERS), metavar="NAME")
    return parser.parse_args(argv)


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Yield the runs that were asked for and that there are."""
    for bits, seed, quantizer, format in product(options.bits, options.seeds, options.quantizers, options.formats):
        row = f"{format}: {quantizer}"
        if bits in FORMATS[format].bits and row in ROWS:
            yield Job(
                row=row,
                fields={"bits": bits},
                words=["allocator=uniform", *FORMATS[format].groups, *ROWS[row], f"allocator.bits={bits}"],
                overrides=ROWS[row],
                seed=seed,
                baseline=row == _FIRST,
            )


def table(record: Mapping[str, Any], bits: int) -> tuple[list[str], list[list[str]]]:
    """Return header and rows at one width, the best on the first text first."""
    results = [each for each in record["results"] if each["bits"] == bits]
    names = list(results[0]["perplexity"]) if results else []
    by_row = {row: [each for each in results if each["row"] == row] for row in ROWS}
    known = {row: mine for row, mine in by_row.items() if mine}
    rows = []
    for row, mine in sorted(known.items(), key=lambda item: mean(each["perplexity"][names[0]] for each in item[1])):
        times = [mean_of(each.get(key) for each in mine) for key in ("seconds", "cpu_seconds")]
        rows.append(
            [
                *row.split(": "),
                str(len(mine)),
                f"{mean(each['storage_bits'] for each in mine):.3f}",
                *(mean_and_range([each["perplexity"][name] for each in mine]) for name in names),
                *("" if seconds is None else f"{seconds:.0f}" for seconds in times),
            ]
        )
    return ["format", "quantizer", "seeds", "stored bits", *(f"{name} ppl" for name in names), "s", "CPU s"], rows


def as_markdown(record: Mapping[str, Any]) -> str:
    """Return the page."""
    told = ", ".join(f"{name} {value:.2f}" for name, value in full_precision(record).items())
    parts = [
        "# Formats and quantizers",
        f"{record['model']} in float32, every layer at the same width, groups of 64 (vectors: one codebook a layer; "
        "trellis, binary: whole rows, binary as published: 128; NVFP4 16, MXFP4 32); "
        f"{record['samples']} calibration samples of {record['length']} tokens, perplexity on "
        f"{record['sequences']} sequences of {record['length']} tokens of each text; full precision: {told}. Rows "
        "without *min-max* search group ranges; *Hadamard*: rotated inputs (QuIP#, QuaRot). Seconds are the whole "
        "process but for judging, and of runs that had "
        "the machine for themselves; CPU seconds are those of the whole process, judging too, on one thread.",
    ]
    for bits in sorted({each["bits"] for each in record["results"]}):
        parts += [f"## {bits} bits", markdown_table(*table(record, bits))]
    return "\n\n".join(parts + footer(record, ROWS)) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing from the record, and write the page after every run."""
    options = parse(argv)
    record = run_jobs(options, jobs(options), as_markdown, "formats")
    for bits in options.bits:
        console.print(as_rich(*table(record, bits), title=f"{bits} bits"))


if __name__ == "__main__":
    main()
