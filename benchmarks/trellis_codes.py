"""How near the codes of format ``trellis`` come to the rate-distortion bound, and the search for their multipliers.

    python benchmarks/trellis_codes.py
    python benchmarks/trellis_codes.py --search 160 --state-bits 10 --bits 2 3

Values are drawn from the normal distribution; errors are mean squares, as a share of the variance. The search tries
random odd multipliers on few values, and the best of them on more; it takes some minutes for states of 10 bits.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import machine
import torch
from provenance import commit
from rich.console import Console
from tables import as_rich, markdown_table
from torch import Tensor

from aptq.formats.trellis_code import BITS, STATE_BITS, best_codes, best_scale, states_of, values_of_states
from aptq.kernels.quantiles import quantiles

HERE = Path(__file__).resolve().parent
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.0006442}
"""Of the best scalar quantizers (Max, 1960; Jayant and Noll, 1984, table 4.2)."""
_USUAL = 1.44
_SCALES = tuple(round(1.2 + 0.02 * step, 2) for step in range(21))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS), choices=list(BITS))
    parser.add_argument("--state-bits", type=int, nargs="+", default=list(STATE_BITS))
    parser.add_argument("--search", type=int, default=0, metavar="N", help="try N multipliers instead of the table")
    parser.add_argument("--columns", type=int, default=100, help="of values, for the table")
    parser.add_argument("--rows", type=int, default=1024, help="values in a column")
    parser.add_argument("--markdown", type=Path, default=HERE / "results" / "trellis_codes.md")
    return parser.parse_args(argv)


def normal(columns: int, rows: int, seed: int) -> Tensor:
    """Return seeded values ``[columns, rows]``."""
    return torch.randn(columns, rows, generator=torch.Generator().manual_seed(seed))


def error(values: Tensor, table: Tensor, bits: int, scale: float) -> float:
    """Return the mean squared error of values coded at a scale."""
    scales = torch.full_like(values, scale)
    states = states_of(best_codes(values, scales, table, bits), bits, len(table).bit_length() - 1)
    return float((values - scale * table[states]).square().mean())


def search(bits: int, state_bits: int, tries: int) -> tuple[float, int, float]:
    """Return the least error, its multiplier and its scale, of so many multipliers."""
    few, more = normal(10, 576, seed=7), normal(40, 1024, seed=8)
    chosen = random.Random(state_bits * bits).sample(range(1, 1 << state_bits, 2), tries)
    ranked = sorted((error(few, quantiles(each, state_bits), bits, _USUAL), each) for each in chosen)[:8]
    _, best = min((error(more, quantiles(each, state_bits), bits, _USUAL), each) for _, each in ranked)
    return min((error(more, quantiles(best, state_bits), bits, scale), best, scale) for scale in _SCALES)


def main(argv: Sequence[str] | None = None) -> None:
    """Search, or write the table."""
    options, console = parse(argv), Console()
    if options.search:
        for state_bits in options.state_bits:
            for bits in options.bits:
                least, multiplier, scale = search(bits, state_bits, options.search)
                console.print(f"{state_bits} bits of state, {bits} bits: {multiplier} at {scale}, error {least:.5f}")
        return
    values = normal(options.columns, options.rows, seed=9)
    header = ["bits", "bound", *(f"trellis, {each} bits of state" for each in options.state_bits), "best scalar"]
    rows = []
    for bits in options.bits:
        found = [
            error(values, values_of_states(bits, state_bits), bits, best_scale(bits, state_bits))
            for state_bits in options.state_bits
        ]
        rows.append([str(bits), f"{4.0**-bits:.5f}", *(f"{each:.5f}" for each in found), f"{LLOYD_MAX[bits]:.5f}"])
    title = "Codes of `trellis` on normally distributed values"
    console.print(as_rich(header, rows, title))
    command = shlex.join(["python", "benchmarks/trellis_codes.py", *sys.argv[1:]])
    parts = [
        f"# {title}",
        f"Mean squared error as a share of the variance, {options.columns} columns of {options.rows} values. Bound: "
        "that of any code at this rate; best scalar: Max (1960), Jayant and Noll (1984).",
        markdown_table(header, rows),
        f"Machine: {machine.sentence(machine.describe())}. Date: {datetime.now(UTC):%Y-%m-%d}. Commit: {commit()}.",
        f"```\n{command}\n```",
    ]
    options.markdown.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
