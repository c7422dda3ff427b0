"""What vector codebooks cost and gain: time, stored bits and error of one layer against the number of centroids.

    python benchmarks/vector_codebooks.py --out 1536 --in 576 --codebooks v4-k16 v4-k256 v4-k4096

The weight is random normal, the inputs are correlated; both are seeded. The error is that of the layer's outputs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import machine
import torch
from provenance import commit
from rich.console import Console
from tables import as_rich, markdown_table

from aptq.api import Curvature, Option
from aptq.registry import build

HERE = Path(__file__).resolve().parent
HEADER = [
    "codebook",
    "stored bits",
    "nearest s",
    "gptq s",
    "error, nearest",
    "error, gptq",
    "error, gptq, not refitted",
]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=int, default=1536)
    parser.add_argument("--in", type=int, default=576, dest="inputs")
    parser.add_argument("--codebooks", nargs="+", default=["v4-k16", "v4-k64", "v4-k256", "v4-k1024", "v4-k4096"])
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--markdown", type=Path, default=HERE / "results" / "vector_codebooks.md")
    return parser.parse_args(argv)


def layer(out: int, inputs: int) -> tuple[torch.Tensor, Curvature]:
    """Return a seeded weight ``[out, in]`` and the curvature of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, inputs, generator=generator) * 0.02
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    hidden = torch.randn(4 * inputs, inputs, generator=generator) @ mixing
    column = hidden.T @ hidden / len(hidden)
    return weight, Curvature(column=column[None], tokens=len(hidden))


def row(codebook: str, weight: torch.Tensor, curvature: Curvature) -> list[str]:
    """Return the cells of one codebook."""
    option, found = Option(bits=2, group_size=-1), {}
    for refits, name in ((2, "nearest"), (2, "gptq"), (0, "gptq")):
        format = build("format", {"name": "vector", "bits_2": codebook, "refits": refits})
        quantizer = build("quantizer", {"name": name})
        factors = quantizer.prepare(curvature)
        started = time.perf_counter()
        rounded = quantizer.quantize(weight, factors, format, option)
        seconds = time.perf_counter() - started
        error = curvature.quadratic(weight - format.dequantize(rounded.weight, option)) / curvature.quadratic(weight)
        found[name, refits] = seconds, error
    layout = format.packed_layout(option, tuple(weight.shape)).values()
    bits = sum(8 * dtype.itemsize * torch.Size(shape).numel() for shape, dtype in layout) / weight.numel()
    times = [f"{found[name, 2][0]:.1f}" for name in ("nearest", "gptq")]
    return [codebook, f"{bits:.3f}", *times, *(f"{error:.4f}" for _, error in found.values())]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all codebooks and write the page."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    weight, curvature = layer(options.out, options.inputs)
    rows = [row(codebook, weight, curvature) for codebook in options.codebooks]
    title = f"One layer of {options.out} outputs and {options.inputs} inputs, {options.threads} threads"
    Console().print(as_rich(HEADER, rows, title=title))
    parts = [
        "# Vector codebooks: time and error against the number of centroids",
        f"{title}: a random weight, correlated inputs; the error as a share of the outputs' energy; one run each.",
        markdown_table(HEADER, rows),
        f"Machine: {machine.sentence(machine.describe())}. Date: {datetime.now(UTC):%Y-%m-%d}. Commit: {commit()}.",
        f"```\n{shlex.join(['python', 'benchmarks/vector_codebooks.py', *sys.argv[1:]])}\n```",
    ]
    options.markdown.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
