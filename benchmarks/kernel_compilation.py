"""Compile the Triton kernels that are shipped for GPUs that need not be here, and count what they became.

Writes a table of registers, shared memory, widths of loads and instructions for a weight: ``results/kernels_compiled``
``.json`` and ``.md``. What an earlier run compiled is kept, but for kernels whose sources have changed since.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import triton

import aptq.kernels.triton
from aptq.kernels.triton.compiled import KERNELS, compile_config, kernel_name
from aptq.kernels.triton.configs import DENSE, DENSE_VECTORS, LOOKED_UP, ONE_ROW, SHIPPED, VECTORS, Config

RESULTS = Path(__file__).resolve().parent / "results"
CODES = [(bits, meaning) for meaning in ("zeros", "symmetric") for bits in (2, 3, 4, 8)]
CODES += [(bits, meaning) for meaning in ("levels", "two-sided") for bits in (2, 3, 4)]
STATES = [(2, "states of 10"), (3, "states of 10"), (4, "states of 10"), (2, "states of 12")]
BLOCKS = [(2, "codebooks"), (4, "codebooks"), (4, "levels in 16")]
OF_VECTORS = [(8, "vectors of 8"), (6, "residual vectors of 4")]
CASES = [
    (SHIPPED, CODES),
    ((*LOOKED_UP.values(), DENSE), STATES),
    ((*ONE_ROW, LOOKED_UP[2], LOOKED_UP[4], DENSE), BLOCKS),
    ((*VECTORS.values(), DENSE_VECTORS), OF_VECTORS),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90, 100], help="of the GPUs")
    parser.add_argument("--results", type=Path, default=RESULTS / "kernels_compiled.json")
    options = parser.parse_args()
    record = _open(options.results)
    done = {_key(row) for row in record["rows"]}
    for config, bits, meaning, capability in cases(options.capabilities):
        case = {"config": asdict(config), "bits": bits, "meaning": meaning, "capability": capability}
        if _key(case) in done:
            continue
        found = compile_config(config, bits, meaning, capability)
        row = {
            **case,
            "registers": found.registers,
            "stack": found.stack,
            "spills": found.count("LDL", "STL"),
            "shared": found.shared,
            "per_weight": round(found.per_weight, 2),
            "wide_loads": found.wide_loads,
            "words": found.words,
            "tensor_cores": found.tensor_cores,
        }
        record["rows"].append(row)
        options.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(config.kernel, config.rows, bits, meaning, capability, row["registers"], row["per_weight"], flush=True)
    options.results.with_suffix(".md").write_text(page(record), encoding="utf-8")


def cases(capabilities: list[int]) -> Iterator[tuple[Config, int, str, int]]:
    """Yield what is compiled: tiles, bits, meaning and capability."""
    for capability in sorted(capabilities, key=lambda each: (each != 90, each)):
        for configs, codes in CASES:
            for config, (bits, meaning) in product(configs, codes):
                yield config, bits, meaning, capability


def _key(case: Mapping[str, Any]) -> str:
    return json.dumps([case[name] for name in ("config", "bits", "meaning", "capability")], sort_keys=True)


def digests() -> dict[str, str]:
    """Return for every kernel what tells its sources from others: those of its module and the ones that it imports."""
    return {name: _digest(kernel.fn.__module__) for name, kernel in KERNELS.items()}


def _digest(module: str) -> str:
    sources = hashlib.sha256()
    for path in sorted(_sources(module)):
        sources.update(path.read_bytes())
    return sources.hexdigest()[:12]


def _sources(module: str) -> set[Path]:
    """Return the files of a module of our kernels and of those that it imports."""
    path = Path(aptq.kernels.triton.__file__).parent / f"{module.rpartition('.')[2]}.py"
    imported = re.findall(r"^from (aptq\.kernels\.triton\.\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {path}.union(*map(_sources, imported))


def _open(path: Path) -> dict[str, Any]:
    fresh = {
        "triton": triton.__version__,
        "sources": digests(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/kernel_compilation.py", *sys.argv[1:]]),
        "rows": [],
    }
    if not path.exists():
        return fresh
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if before["triton"] != fresh["triton"]:
        return fresh
    same = {name for name, digest in digests().items() if before["sources"].get(name) == digest}
    return fresh | {
        "rows": [row for row in before["rows"] if kernel_name(row["config"]["kernel"], row["meaning"]) in same]
    }


def page(record: Mapping[str, Any]) -> str:
    """Return the table: a line for each config and kind of codes, for each GPU registers and instructions."""
    capabilities = sorted({row["capability"] for row in record["rows"]})
    lines = [
        "# What the Triton kernels compile to",
        "",
        "Counted in the machine code that Triton and NVIDIA's assembler make for GPUs that were not there: nothing was",
        "run, and these are no times. Activations are bfloat16, groups 128 inputs, outputs and inputs multiples of the",
        "tiles. For each compute capability: registers of a thread, instructions for a weight in the loop over the",
        "inputs (of `dense`, in all), loads of 128 bits for each four 32-bit words of codes (1.00 and more: all are so",
        "wide; scales and, in `dot`, activations may be as well). Tiles are units of 32 inputs x outputs. Groups of",
        "`codebooks`, of which there are 8, are 64 inputs; rows of codebooks of vectors are read 64 bits wide.",
        "",
        "| kernel | rows | tile | warps | bits | codes | "
        + " | ".join(f"{value / 10:.1f}: registers | instructions | wide" for value in capabilities)
        + " |",
        "|---|---:|---|---:|---:|---|" + "---:|" * 3 * len(capabilities),
    ]
    found: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in record["rows"]:
        config = row["config"]
        tile = f"{config['units']} x {config['columns']}"
        key = (config["kernel"], config["rows"], tile, config["warps"], row["bits"], row["meaning"])
        found.setdefault(key, {})[row["capability"]] = row
    for key, by_capability in found.items():
        cells = [_cells(by_capability.get(value)) for value in capabilities]
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} |")
    spilled = [row for row in record["rows"] if row["stack"] or row["spills"]]
    most = max((row["stack"] for row in spilled), default=0)
    told = f"{len(spilled)} keep up to {most} bytes of a thread in memory" if spilled else "none spills a register"
    lines += ["", f"Of {len(record['rows'])} compilations {told}.", ""]
    sources = ", ".join(f"{name} {digest}" for name, digest in record["sources"].items())
    lines.append(f"Triton {record['triton']}, {record['date']}, written by `{record['command']}`; sources: {sources}.")
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "| |"
    return f"{row['registers']} | {row['per_weight']:.2f} | {row['wide_loads'] / (row['words'] / 4):.2f}"


if __name__ == "__main__":
    main()
