"""Weights in 4 bits, and activations too: block_clustered (LO-BCQ) beside MXFP4, NVFP4 and INT4 at the same size.

    python benchmarks/w4a4.py --model smollm2 --calibration C4_TRAIN.jsonl \
        --evaluation c4=C4_VALIDATION.jsonl wikitext2=WIKITEXT2_TEST.txt

Each run is a fresh process of the public command line. Results are added to the JSON record one by one, and runs that
it has are not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from tables import as_rich, markdown_table

from runs import Job, add_options, console, footer, full_precision, mean_and_range, run_jobs

HERE = Path(__file__).resolve().parent

INT4 = ["format=integer", "format.symmetric=true", "format.scale_dtype=e4m3", "format.clip_steps=0"]
CONTESTANTS: dict[str, tuple[float, list[str], list[str]]] = {  # bits of a number, weights, activations
    "MXFP4": (4.25, ["format=mxfp4"], ["activation=mxfp4"]),
    "INT4, blocks of 32": (4.25, [*INT4, "format.group_size=32"], ["activation=int4", "activation.group_size=32"]),
    "block_clustered, 2 codebooks": (
        4.25,
        ["format=block_clustered", "format.num_codebooks=2"],
        ["activation=block_clustered", "activation.num_codebooks=2"],
    ),
    "NVFP4": (4.5, ["format=nvfp4"], ["activation=nvfp4"]),
    "NVFP4, ranges searched": (4.5, ["format=nvfp4", "format.clip_steps=8"], ["activation=nvfp4"]),
    "INT4, blocks of 16": (4.5, [*INT4, "format.group_size=16"], ["activation=int4"]),
    "block_clustered, 8 codebooks": (4.5, ["format=block_clustered"], ["activation=block_clustered"]),
    "block_clustered, 8 codebooks of the layer": (
        4.5,
        ["format=block_clustered", "format.codebooks=calibrated"],
        ["activation=block_clustered"],
    ),
    "block_clustered, 8 codebooks, no search": (
        4.5,
        ["format=block_clustered", "format.clip_steps=0"],
        ["activation=block_clustered"],
    ),
    "block_clustered, 16 codebooks": (
        4.625,
        ["format=block_clustered", "format.num_codebooks=16"],
        ["activation=block_clustered", "activation.num_codebooks=16"],
    ),
}
CONTESTANTS |= {
    f"{name}, Hadamard": (bits, [*weights, "transform=hadamard"], inputs)
    for name, (bits, weights, inputs) in CONTESTANTS.items()
}
QUANTIZERS: dict[str, list[str]] = {
    "nearest": ["hessian=identity", "quantizer=nearest"],
    "gptq": ["hessian=input", "quantizer=gptq", "quantizer.refine=0"],
}
INPUTS = ("W4A16", "W4A4")


def _words(contestant: str, quantizer: str, inputs: str) -> list[str]:
    _, weights, activations = CONTESTANTS[contestant]
    return [*weights, *QUANTIZERS[quantizer], *(activations if inputs == "W4A4" else [])]


ROWS = {
    f"{contestant}: {quantizer}: {inputs}": _words(contestant, quantizer, inputs)
    for contestant, quantizer, inputs in product(CONTESTANTS, QUANTIZERS, INPUTS)
}
_BASELINE = "NVFP4: gptq: W4A4"  # the original model is judged beside it


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, HERE / "results" / "w4a4")
    parser.add_argument(
        "--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS), metavar="NAME"
    )
    parser.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=list(QUANTIZERS), metavar="NAME")
    parser.add_argument("--inputs", nargs="+", default=list(INPUTS), choices=INPUTS)
    return parser.parse_args(argv)


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Yield the runs that were asked for."""
    for inputs, quantizer, seed, contestant in product(
        options.inputs, options.quantizers, options.seeds, options.contestants
    ):
        row = f"{contestant}: {quantizer}: {inputs}"
        yield Job(
            row=row,
            fields={"bits": 4},
            words=["allocator=uniform", "allocator.bits=4", *ROWS[row]],
            overrides=ROWS[row],
            seed=seed,
            baseline=row == _BASELINE,
        )


def table(record: Mapping[str, Any], inputs: str) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of weights alone or of both, by size and the best on the first text first."""
    mine: dict[str, list[Mapping[str, Any]]] = {}
    for each in record["results"]:
        if each["row"].endswith(f": {inputs}"):
            mine.setdefault(each["row"], []).append(each)
    names = list(record["results"][0]["perplexity"]) if record["results"] else []

    def order(row: str) -> tuple[str, float, float]:
        contestant, quantizer, _ = row.split(": ")
        return quantizer, CONTESTANTS[contestant][0], mean(each["perplexity"][names[0]] for each in mine[row])

    rows = []
    for row in sorted(mine, key=order):
        contestant, quantizer, _ = row.split(": ")
        figures = [mean_and_range([each["perplexity"][name] for each in mine[row]]) for name in names]
        stored = f"{mean(each['storage_bits'] for each in mine[row]):.3f}"
        rows.append([quantizer, contestant, f"{CONTESTANTS[contestant][0]:g}", stored, *figures])
    return ["quantizer", "numbers", "bits", "stored bits a weight", *(f"{name} ppl" for name in names)], rows


def as_markdown(record: Mapping[str, Any]) -> str:
    """Return the page."""
    told = ", ".join(f"{name} {value:.2f}" for name, value in full_precision(record).items())
    parts = [
        "# Weights and activations in 4 bits",
        f"{record['model']} in float32, all linear layers of the blocks; {record['samples']} calibration samples of "
        f"{record['length']} tokens, perplexity on {record['sequences']} sequences of {record['length']} tokens of "
        f"each text; full precision: {told}. *bits* are those of a number, weight or input: code, selectors and "
        "scales; *stored bits* are those of the file, with codebooks and padding.",
    ]
    for inputs, title in zip(INPUTS, ("Weights alone (W4A16)", "Weights and activations (W4A4)"), strict=True):
        header, rows = table(record, inputs)
        if rows:
            parts += [f"## {title}", markdown_table(header, rows)]
    return "\n\n".join(parts + footer(record, ROWS)) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing from the record, and write the page after every run."""
    options = parse(argv)
    record = run_jobs(options, jobs(options), as_markdown, "w4a4")
    for inputs in options.inputs:
        console.print(as_rich(*table(record, inputs), title=inputs))


if __name__ == "__main__":
    main()
