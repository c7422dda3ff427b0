"""Design the codebooks that come with aptq for ``block_clustered``, and tell what they are worth.

    python benchmarks/block_codebooks.py --model smollm2 --calibration C4_TRAIN.jsonl

Those of ``normal``, for weights, are designed for arrays of 64 standard normal numbers; those of ``activations`` for
what the layers of a model are called with on a text, each token's errors as a share of its own energy. Everything is
drawn by ``--seed``. Writes ``aptq/formats/block_codebooks.json`` and prints the relative squared error of the model's
weights and, on other tokens than the design's, of its activations.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from lightning.fabric import Fabric
from rich.console import Console
from tables import as_rich
from torch import Tensor

from aptq.activations.block_clustered import BlockClustered
from aptq.activations.block_scaled import BlockScaled
from aptq.activations.tokens import split, token_scale
from aptq.calibration.walk import Walk
from aptq.data import calibration_samples
from aptq.formats.block_clusters import COUNTS, TOP, Codebooks
from aptq.formats.block_design import design
from aptq.models import open_model
from aptq.settings import DataSettings, ModelSettings

WRITTEN = Path(__file__).resolve().parents[1] / "aptq" / "formats" / "block_codebooks.json"
ARRAY, BLOCK = 64, 8
BLOCKS = 60_000  # to design by


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=WRITTEN)
    return parser.parse_args(argv)


def layers(options: argparse.Namespace) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield every layer's name, weight ``[out, in]`` and 256 of its inputs ``[tokens, in]``, drawn by the seed."""
    source = open_model(ModelSettings(path=options.model))
    data = DataSettings(
        source="text",
        path=str(options.calibration),
        num_samples=options.samples,
        sequence_length=options.length,
        seed=options.seed,
    )
    fabric = Fabric(accelerator="cpu", devices=1)
    walk = Walk(source, calibration_samples(data, source.tokenizer), 1, fabric)
    generator = torch.Generator().manual_seed(options.seed)
    for step in walk.blocks():
        seen: dict[str, list[Tensor]] = {name: [] for name in step.block.layers}

        def keep(name: str, seen: dict[str, list[Tensor]] = seen):  # type: ignore[no-untyped-def]
            return lambda module, args: seen[name].append(args[0].flatten(0, -2))

        handles = [layer.module.register_forward_pre_hook(keep(name)) for name, layer in step.block.layers.items()]
        step.run()
        for handle in handles:
            handle.remove()
        for name, layer in step.block.layers.items():
            inputs = torch.cat(seen[name])
            yield name, layer.weight().float(), inputs[torch.randperm(len(inputs), generator=generator)[:256]].clone()


def scaled_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return blocks ``[n, 8]`` with their scale divided out, and what their errors are worth ``[n, 1]``."""
    groups = split(x, ARRAY)
    scale = token_scale(groups.abs().amax(-1), float(TOP), "e4m3")[..., None]
    worth = scale.square() / x.float().square().mean(-1).clamp(min=1e-30)[:, None, None]
    shape = (*groups.shape[:-1], ARRAY // BLOCK)
    return (groups / scale).reshape(-1, BLOCK), worth.expand(shape).reshape(-1, 1)


def design_all(normal: Tensor, blocks: Tensor, worth: Tensor, seed: int) -> dict[str, list[list[int]]]:
    """Return the codebooks by source, number and levels."""
    found = {}
    for count in COUNTS:
        for levels in (4, 8, 16):
            entries = design(normal, count, levels, seed=seed).entries
            found[f"normal/{count}/{levels}"] = entries.int().tolist()
        found[f"activations/{count}/16"] = design(blocks, count, 16, weights=worth, seed=seed).entries.int().tolist()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Design, write and judge."""
    options = parse(argv)
    generator = torch.Generator().manual_seed(options.seed)
    normal, _ = scaled_blocks(torch.randn(BLOCKS * BLOCK // ARRAY, ARRAY, generator=generator))
    found = list(layers(options))
    pairs = [scaled_blocks(inputs[:128]) for _, _, inputs in found]
    blocks, worth = (torch.cat(part) for part in zip(*pairs, strict=True))
    drawn = torch.randperm(len(blocks), generator=generator)[:BLOCKS]
    books = design_all(normal, blocks[drawn], worth[drawn], options.seed)
    record = {"made_by": "benchmarks/block_codebooks.py", "seed": options.seed, "codebooks": books}
    lines = json.dumps(record, indent=1).splitlines()
    options.json.write_text(_compact(lines) + "\n", encoding="utf-8")
    show(found, {name: torch.tensor(each).float() for name, each in books.items()})


def _compact(lines: Sequence[str]) -> str:
    """Join what JSON spreads over lines: a codebook a line."""
    joined: list[str] = []
    for line in lines:
        text = line.strip()
        if text.rstrip(",").lstrip("-").isdigit() or (text in ("]", "],") and joined[-1].strip()[-1].isdigit()):
            joined[-1] += (" " if joined[-1].endswith(",") else "") + text
        else:
            joined.append(line)
    return "\n".join(joined)


def show(found: Sequence[tuple[str, Tensor, Tensor]], books: dict[str, Tensor]) -> None:
    """Print mean relative squared errors of weights (rows as tokens) and of inputs that were not designed for."""
    contestants = {
        "mxfp4": BlockScaled(bits=4, code="fp", group_size=32, scale_dtype="e8m0").quantize,
        "nvfp4": BlockScaled(bits=4, code="fp", group_size=16, scale_dtype="e4m3").quantize,
        "int4": BlockScaled(bits=4, group_size=16, scale_dtype="e4m3").quantize,
        **{f"activations, {count}": BlockClustered(num_codebooks=count).quantize for count in COUNTS},
    }
    rows = []
    for name, quantize in contestants.items():
        rows.append([name, *(f"{1e3 * _error(found, place, quantize):.2f}" for place in (1, 2))])
    for count in COUNTS:
        entries = Codebooks.of(books[f"normal/{count}/16"])

        def by_normal(x: Tensor, entries: Codebooks = entries) -> Tensor:
            groups = split(x, ARRAY)
            scale = token_scale(groups.abs().amax(-1), float(TOP), "e4m3")[..., None]
            values = (groups / scale).unflatten(-1, (-1, BLOCK))
            return entries.round(values, entries.choose(values)[0][..., None])[1].flatten(-2).mul(scale).flatten(-2)

        rows.append([f"normal, {count}", *(f"{1e3 * _error(found, place, by_normal):.2f}" for place in (1, 2))])
    Console().print(as_rich(["codebooks", "weights, 1e-3", "activations, 1e-3"], rows, title="Relative squared error"))


def _error(found: Sequence[tuple[str, Tensor, Tensor]], place: int, quantize) -> float:  # type: ignore[no-untyped-def]
    shares = []
    for row in found[::7]:
        x = row[place][128:256]
        shares.append(float((quantize(x) - x).square().sum() / x.square().sum()))
    return sum(shares) / len(shares)


if __name__ == "__main__":
    main()
