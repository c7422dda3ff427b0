"""The paper's objective itself: how far does rounding one projection move the attention block's output, on other text?

    python benchmarks/attention_error.py --model SMOLLM2 --calibration C4_TRAIN.jsonl --bits 3

Some blocks of the full-precision model are taken one by one. Each projection is rounded alone, by curvatures from the
calibration samples, and the relative squared error of the attention's output is measured on samples that were not
calibrated on: the objective of APTQ (equation 5), with no other error in between.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import machine
import torch
from lightning.fabric import Fabric
from provenance import commit
from rich.console import Console
from tables import as_rich, markdown_table
from torch import Tensor

from aptq.api import Curvature, HessianEstimator, Layer, Option, Quantizer
from aptq.calibration.observe import observe
from aptq.calibration.walk import Step, Walk
from aptq.data import calibration_samples
from aptq.formats.integer import Integer
from aptq.hessians.attention import Attention
from aptq.hessians.input import Input
from aptq.models import open_model
from aptq.models.structure import find_attentions
from aptq.quantizers.gptq import GPTQ
from aptq.quantizers.nearest import Nearest
from aptq.quantizers.two_sided import TwoSided
from aptq.settings import DataSettings, ModelSettings

HERE = Path(__file__).resolve().parent
PUBLISHED = {"damping": 0.01, "damping_scale": "mean", "refine": 0}
Contestants = dict[str, tuple[HessianEstimator, Quantizer]]
CONTESTANTS: Contestants = {
    "nearest": (Input(), Nearest()),
    "input, gptq as published": (Input(), GPTQ(**PUBLISHED)),  # type: ignore[arg-type]
    "input, gptq": (Input(), GPTQ(refine=0)),
    "input, gptq, damping 0.05": (Input(), GPTQ(damping=0.05, refine=0)),
    "input, gptq refined": (Input(), GPTQ(refine=3)),
    "attention, gptq as published": (Attention(), GPTQ(**PUBLISHED)),  # type: ignore[arg-type]
    "attention, gptq": (Attention(), GPTQ(refine=0)),
    "attention, gptq, damping 0.05": (Attention(), GPTQ(damping=0.05, refine=0)),
    "attention, gptq refined": (Attention(), GPTQ(refine=3)),
    "attention, two_sided": (Attention(), TwoSided()),
    "attention (random values), two_sided": (Attention(values="random"), TwoSided()),
    "attention (two probes), gptq": (Attention(probes=2), GPTQ(refine=0)),
    "attention (layer), gptq": (Attention(scope="layer"), GPTQ(refine=0)),
    "attention (ones), gptq": (Attention(cotangent="ones"), GPTQ(refine=0)),
}
console = Console(width=None if Console().is_terminal else 120)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--calibration", required=True, help="text; the samples to judge by are other ones of it")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16, help="to calibrate on")
    parser.add_argument("--held-out", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--every", type=int, default=5, help="measure every n-th block")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "attention_error.json")
    parser.add_argument("--markdown", type=Path, default=HERE / "results" / "attention_error.md")
    return parser.parse_args(argv)


def block_errors(step: Step, walk: Walk, held_out: int, option: Option) -> dict[str, dict[str, float]]:
    """Return the relative errors of a block's attention output, by contestant and projection."""
    ((name, module),) = find_attentions(step.block.module).items()
    layers = {each: layer for each, layer in step.block.layers.items() if each.startswith(f"{step.block.name}.{name}.")}
    every = step.inputs
    judged, step.inputs = every[-held_out:], every[:-held_out]

    def output() -> list[Tensor]:
        found: list[Tensor] = []
        handle = module.register_forward_hook(
            lambda _, args, out: found.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            for batch in judged:
                batch.run(step.block.module)
        handle.remove()
        return found

    exact = output()
    energy = sum(float(each.double().square().sum()) for each in exact)
    found: dict[str, dict[str, float]] = defaultdict(dict)
    known: list[tuple[HessianEstimator, Mapping[str, Curvature]]] = []
    for contestant, (estimator, quantizer) in CONTESTANTS.items():
        curvatures = next((each for other, each in known if other == estimator), None)
        if curvatures is None:
            curvatures = observe(step, estimator, walk, None, need_outputs=False).curvatures
            known.append((estimator, curvatures))
        for each, layer in layers.items():
            before = layer.weight().clone()
            layer.set_weight(_rounded(layer, curvatures[each], quantizer, option))
            moved = sum(float((a - b).double().square().sum()) for a, b in zip(exact, output(), strict=True))
            layer.set_weight(before)
            found[contestant][each.removeprefix(f"{step.block.name}.{name}.")] = moved / energy
    step.inputs = every
    return found


def _rounded(layer: Layer, curvature: Curvature, quantizer: Quantizer, option: Option) -> Tensor:
    format = Integer(group_size=option.group_size)
    rounded = quantizer.quantize(layer.weight().float(), quantizer.prepare(curvature), format, option)
    return format.dequantize(rounded.weight, option)


def table(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the geometric means over the blocks, each projection relative to the second contestant's."""
    layers = list(next(iter(results[0]["errors"].values())))
    means = {
        contestant: {layer: geometric_mean(each["errors"][contestant][layer] for each in results) for layer in layers}
        for contestant in results[0]["errors"]
    }
    base = means[list(means)[1]]
    rows = [
        [contestant, *(f"{values[layer]:.2e} ({values[layer] / base[layer]:.2f})" for layer in layers)]
        for contestant, values in means.items()
    ]
    return ["", *layers], rows


def as_markdown(record: Mapping[str, Any]) -> str:
    """Return the page."""
    blocks = ", ".join(str(each["block"]) for each in record["results"])
    parts = [
        "# Error of the attention's output on other text",
        f"{record['model']} in float32, one projection rounded at a time to {record['bits']} bits in groups of "
        f"{record['group_size']}, {record['samples']} samples of {record['length']} tokens to calibrate on, "
        f"{record['held_out']} others to judge by. Relative squared error of the attention block's output, geometric "
        f"mean over blocks {blocks}; in brackets the ratio to GPTQ as published (damping 0.01 of the mean diagonal).",
        markdown_table(*table(record["results"])),
        f"Machine: {machine.sentence(record['machine'])}. Date: {record['date']}, commit {record['commit']}.",
        f"```\n{record['command']}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    options = parse(argv)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    source = open_model(ModelSettings(path=options.model))
    total = options.samples + options.held_out
    settings = DataSettings(
        source="text", path=options.calibration, num_samples=total, sequence_length=options.length, batch_size=1
    )
    walk = Walk(source, calibration_samples(settings, source.tokenizer), 1, fabric)
    results = []
    report: Callable[[str], None] = console.print
    for step in walk.blocks():
        if step.block.index % options.every == options.every // 2:
            errors = block_errors(step, walk, options.held_out, Option(options.bits, options.group_size))
            results.append({"block": step.block.index, "errors": errors})
            report(f"block {step.block.index}")
        step.run()
    record = {
        **{key: getattr(options, key) for key in ("bits", "group_size", "samples", "held_out", "length")},
        "model": Path(options.model).name,
        "results": results,
        "machine": machine.describe(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit(),
        "command": shlex.join(["python", "benchmarks/attention_error.py", *(argv or sys.argv[1:])]),
    }
    options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    options.markdown.write_text(as_markdown(record), encoding="utf-8")
    console.print(as_rich(*table(results), title=f"relative error at {options.bits} bits"))


if __name__ == "__main__":
    main()
