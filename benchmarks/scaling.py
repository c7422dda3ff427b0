"""How aptq's time and peak memory grow with calibration samples and with blocks.

    python benchmarks/scaling.py

Random models of two widths (a tiny one and SmolLM2's) are quantized by the public command line, each in a fresh
process. Blocks are streamed, so memory should not grow with their number, and time should grow linearly with both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
import numpy as np
from contestants import aptq_command
from environments import clean_environment
from measured import run_measured
from provenance import commit
from rich.console import Console
from tables import as_rich, markdown_table, provenance

HERE = Path(__file__).resolve().parent
HEADER = ["varied", "width", "blocks", "samples", "wall s", "quantize s", "CPU s", "peak MB", "weights MB"]
console = Console(width=None if Console().is_terminal else 120)


@dataclass(frozen=True)
class Point:
    """One run."""

    varied: str  # "samples" or "blocks"
    width: int
    blocks: int
    samples: int
    seconds: float
    quantize_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    weight_bytes: int  # of the blocks in full precision: what would be held if nothing was streamed

    def row(self) -> list[str]:
        """Return the cells of the table."""
        times = (f"{value:.1f}" for value in (self.seconds, self.quantize_seconds, self.cpu_seconds))
        sizes = (f"{value / 1e6:.0f}" for value in (self.peak_rss_bytes, self.weight_bytes))
        return [self.varied, *map(str, (self.width, self.blocks, self.samples)), *times, *sizes]


def numbers(text: str) -> list[int]:
    """Return the whole numbers of a list separated by commas."""
    return [int(part) for part in text.split(",")]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=numbers, default=[64, 576], help="hidden sizes (default: 64,576)")
    parser.add_argument("--samples", type=numbers, default=[4, 8, 16, 32], help="with --fixed-blocks blocks")
    parser.add_argument("--blocks", type=numbers, default=[5, 10, 20, 30], help="with --fixed-samples samples")
    parser.add_argument("--fixed-blocks", type=int, default=10)
    parser.add_argument("--fixed-samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--override", nargs="*", default=[], help="further overrides of aptq's config")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of scaling.png, .md, .json")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace, work: Path) -> list[Point]:
    """Run every point; models are made as they are needed."""
    points = []
    for width in options.widths:
        wanted = [("samples", options.fixed_blocks, samples) for samples in options.samples]
        wanted += [("blocks", blocks, options.fixed_samples) for blocks in options.blocks]
        for varied, blocks, samples in wanted:
            point = run_point(options, work, varied, width, blocks, samples)
            points.append(point)
            console.print(
                f"width {width}, {blocks} blocks, {samples} samples: {point.seconds:.1f} s, "
                f"{point.peak_rss_bytes / 1e6:.0f} MB"
            )
    return points


def run_point(options: argparse.Namespace, work: Path, varied: str, width: int, blocks: int, samples: int) -> Point:
    """Quantize one model once, in a fresh process."""
    model = work / f"model-{width}-{blocks}"
    if not model.exists():
        script = [sys.executable, str(HERE / "random_model.py")]
        command = [*script, f"--width={width}", f"--blocks={blocks}", f"--folder={model}"]
        run_measured(command, log=work / "model.log", env=dict(os.environ))
    folder = work / f"{varied}-{width}-{blocks}-{samples}"
    settings = {
        "model.path": model,
        "data.num_samples": samples,
        "data.sequence_length": options.length,
        "allocator.bits": options.bits,
        "format.group_size": 64,
        "data.batch_size": 1,
    }
    run = run_measured(
        aptq_command(folder, settings, ["data=pydoc", *options.override]),
        log=work / f"{folder.name}.log",
        env=clean_environment(options.threads, isolated=False),
    )
    metrics = json.loads((folder / "run" / "metrics.json").read_text(encoding="utf-8"))
    weights = 4 * blocks * (width * width * 2 + 2 * width * key_value_width(width) + 3 * width * (width * 8 // 3))
    return Point(
        varied=varied,
        width=width,
        blocks=blocks,
        samples=samples,
        seconds=run.seconds,
        quantize_seconds=metrics["seconds"]["quantize"],
        cpu_seconds=run.cpu_seconds,
        peak_rss_bytes=run.peak_rss_bytes,
        weight_bytes=weights,
    )


def key_value_width(width: int) -> int:
    """Return the output width of the key and value layers of the random model."""
    heads = max(1, width // 64)
    return (heads // 3 if heads % 3 == 0 else heads) * (width // heads)


def fits(points: Sequence[Point]) -> list[str]:
    """Return, for every line of the plot, its slope and how well a straight line explains it."""
    sentences = []
    for width, varied in sorted({(point.width, point.varied) for point in points}):
        line = [point for point in points if (point.width, point.varied) == (width, varied)]
        x = np.array([getattr(point, varied) for point in line], dtype=float)
        seconds = np.array([point.quantize_seconds for point in line])
        memory = np.array([point.peak_rss_bytes / 1e6 for point in line])
        if len(x) < 3:
            continue
        slope, offset = np.polyfit(x, seconds, 1)
        spread = ((seconds - seconds.mean()) ** 2).sum()
        explained = 1 - ((seconds - slope * x - offset) ** 2).sum() / spread if spread else 1.0
        sentences.append(
            f"width {width}, more {varied}: {slope:.2f} s and {np.polyfit(x, memory, 1)[0]:.1f} MB for each; a "
            f"straight line explains {explained:.1%} of the quantize time's variance"
        )
    return sentences


def plot(points: Sequence[Point], path: Path) -> None:
    """Draw time and peak memory against samples and against blocks, a line for every width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex="col", layout="constrained")
    for column, varied in enumerate(("samples", "blocks")):
        for width in sorted({point.width for point in points}):
            line = [point for point in points if (point.width, point.varied) == (width, varied)]
            x = [getattr(point, varied) for point in line]
            axes[0, column].plot(x, [point.quantize_seconds for point in line], "o-", label=f"hidden size {width}")
            axes[1, column].plot(x, [point.peak_rss_bytes / 1e6 for point in line], "o-", label=f"hidden size {width}")
        largest = [point for point in points if (point.width, point.varied) == (points[-1].width, varied)]
        axes[1, column].plot(
            [getattr(point, varied) for point in largest],
            [point.weight_bytes / 1e6 for point in largest],
            "--",
            color="grey",
            label=f"float32 blocks of {points[-1].width}, were they all held",
        )
        fixed = {point.blocks if varied == "samples" else point.samples for point in largest}
        other = "blocks" if varied == "samples" else "samples"
        axes[0, column].set_title(f"{fixed.pop()} {other}")
        axes[1, column].set_xlabel("calibration samples" if varied == "samples" else "blocks")
        for axis in axes[:, column]:
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("seconds to quantize")
    axes[1, 0].set_ylabel("peak memory of the process, MB")
    axes[0, 0].legend()
    axes[1, 1].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, plot, write the table."""
    options = parse()
    described = machine.describe()
    if machine.is_busy(described):
        console.print("[yellow]The machine is busy with something else: timings will be rough.[/]")
    with tempfile.TemporaryDirectory(prefix="scaling_") as folder:
        points = measure(options, Path(folder))
    options.output.mkdir(parents=True, exist_ok=True)
    plot(points, options.output / "scaling.png")
    record: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "benchmarks/scaling.py", *without(sys.argv[1:], "--output")]),
        "commit": commit(),
        "machine": described,
        "versions": machine.versions(),
        "results": [asdict(point) for point in points],
    }
    (options.output / "scaling.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    rows = [point.row() for point in points]
    page = [
        "# Time and memory against samples and blocks",
        f"aptq's GPTQ at {options.bits} bits, group size 64, on random LLaMA-shaped float32 models; samples of "
        f'{options.length} tokens; {options.threads} threads; every line of the table a fresh process. "Weights" are '
        "the blocks in full precision: what a program that does not stream holds beside everything else.",
        "![Time and memory](scaling.png)",
        markdown_table(HEADER, rows),
        "\n".join(f"- {sentence}" for sentence in fits(points)),
        provenance(record),
    ]
    (options.output / "scaling.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    console.print(as_rich(HEADER, rows, title="Scaling"))
    for sentence in fits(points):
        console.print(sentence)


def without(words: Sequence[str], option: str) -> list[str]:
    """Return a command line without one option and its value: it names a folder of one machine."""
    kept = list(words)
    with contextlib.suppress(ValueError):
        index = kept.index(option)
        del kept[index : index + 2]
    return kept


if __name__ == "__main__":
    main()
