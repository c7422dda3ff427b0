"""Compare the Triton kernels with dense products and torch's own 4-bit ones, on one NVIDIA GPU in under eight minutes.

First every kind of codes is checked against float64, each in a process of its own, which also compiles its kernels.
Then come times, in CUDA graphs and on weights that no cache holds together. With ``--tune FILE`` other tiles are tried
too, and the fastest are written for ``backend.tuning``. Nothing is begun after ``--seconds``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import machine
import torch
from gpu_timing import graph_seconds, packed_tensors, rotating, spec_of
from kernel_candidates import candidates
from provenance import commit
from torch import Tensor
from torch.nn import functional

from aptq import registry
from aptq.api import Format, LayerSpec, Option
from aptq.backends.triton import Triton
from aptq.benchmark.timing import copy_bandwidth
from aptq.kernels.triton.configs import Case, Config, choose, write_table
from aptq.kernels.triton.weight import PackedWeight, VectorWeight

RESULTS = Path(__file__).resolve().parent / "results"
GROUP = 128
SHAPES = [(4096, 4096), (11008, 4096), (14336, 4096), (8192, 28672), (576, 576), (1536, 576), (576, 1536)]
ROWS = (1, 4, 16, 64, 256)
CODES = [("integer", 2), ("integer", 3), ("integer", 4), ("integer", 8), ("float", 4), ("asymmetric_float", 3)]
OTHERS: dict[str, tuple[dict[str, Any], int]] = {
    "trellis": ({"name": "trellis"}, -1),
    "block_clustered": ({"name": "block_clustered"}, 64),
    "float, e4m3 for 16": ({"name": "float", "scale_dtype": "e4m3"}, 16),
    "vector": ({"name": "vector"}, -1),
}
"""Their configs and groups, by what they are called here; others are called as their format, in groups of ``GROUP``."""
CODES += [
    ("trellis", 2),
    ("trellis", 4),
    ("block_clustered", 4),
    ("float, e4m3 for 16", 4),
    ("vector", 1),
    ("vector", 3),
]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def main() -> None:
    options = _options()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py needs an NVIDIA GPU and a torch with CUDA; here torch sees no CUDA device.")
    deadline = time.monotonic() + options.seconds
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(CODES), machine.usable_cores()), mp_context=context) as pool:
        wrong = [case for found in pool.map(check, *zip(*CODES, strict=True)) for case in found]
    if wrong:
        sys.exit("These products are wrong:\n" + "\n".join(wrong))
    device = torch.device("cuda")
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "capability": torch.cuda.get_device_capability(device),
        "bandwidth": copy_bandwidth(device),
        "torch": torch.__version__,
        "commit": commit(),
        "group_size": GROUP,
        "rows": [],
    }
    tuned: list[tuple[Case, Config]] = []
    for row, best in _measured(bool(options.tune), deadline):
        record["rows"].append(row)
        tuned += [best] if best else []
        print(_line(row), flush=True)
        options.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record["finished"] = time.monotonic() < deadline
    options.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    options.results.with_suffix(".md").write_text(page(record), encoding="utf-8")
    options.results.with_suffix(".png").write_bytes(_figure(record))
    if options.tune:
        write_table(options.tune, record["device"], tuned)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=440, help="after which nothing more is begun")
    parser.add_argument("--tune", type=Path, help="try other tiles and write the fastest here")
    parser.add_argument("--results", type=Path, default=RESULTS / "kernels_gpu.json")
    return parser.parse_args()


def _layer(name: str, bits: int) -> tuple[Format, Option]:
    config, group = OTHERS.get(name, ({"name": name}, GROUP))
    return registry.build("format", config), Option(bits, group, config["name"])


def check(name: str, bits: int, device: str = "cuda") -> list[str]:
    """Return the products that are wrong: of small odd layers in every dtype, and of those that are timed."""
    format, option = _layer(name, bits)
    wrong = []
    for shape in [(70, 200), (257, 1000), *SHAPES]:
        dtypes = [torch.bfloat16] if shape in SHAPES else list(TOLERANCES)
        for dtype in dtypes:
            spec = spec_of(format, option, shape, dtype, device)
            stored = packed_tensors(format, option, shape, device)
            dense = format.dequantize(format.unpack(stored, option, shape), option)
            exact_in = torch.float32 if shape in SHAPES else torch.float64
            tensors = Triton().prepack(stored, spec)
            for rows in ROWS if shape in SHAPES else (1, 2, 3, 16, 33, 100):
                x = torch.randn(rows, shape[1], device=device).to(dtype)
                exact = x.to(exact_in) @ dense.to(exact_in).T
                error = float((Triton().matmul(x, tensors, spec).to(exact_in) - exact).norm() / exact.norm())
                if not error <= TOLERANCES[dtype]:
                    wrong.append(f"{name}, {bits} bits, {shape}, {rows} rows, {dtype}: off by {error:.2g}")
            del dense
            torch.cuda.empty_cache()
    return wrong


def _measured(tune: bool, deadline: float) -> Iterator[tuple[dict[str, Any], tuple[Case, Config] | None]]:
    """Yield a row for every case while there is time, and what was fastest of its tiles where they were tried."""
    dtype = torch.bfloat16
    for shape in SHAPES:
        weight = torch.randn(shape, device="cuda", dtype=dtype)
        for rows in ROWS:
            if time.monotonic() > deadline:
                return
            x = torch.randn(rows, shape[1], device="cuda", dtype=dtype)
            dense = graph_seconds(rotating({"weight": weight}, lambda own, x=x: functional.linear(x, own["weight"])))
            int4 = _torch_int4(x, shape) if shape[1] % 64 == shape[0] % 64 == 0 and rows <= 64 else None
            for name, bits in CODES:
                if time.monotonic() > deadline:
                    return
                format, option = _layer(name, bits)
                spec = spec_of(format, option, shape, dtype, "cuda")
                stored = packed_tensors(format, option, shape, "cuda")
                seconds, best = _fastest(x, stored, spec, tune)
                size = sum(tensor.nbytes for tensor in stored.values())
                row = {"shape": shape, "rows": rows, "format": name, "bits": bits, "seconds": seconds, "bytes": size}
                yield row | {"dense_seconds": dense, "int4_seconds": int4 if bits == 4 else None}, best


def _fastest(
    x: Tensor, stored: Mapping[str, Tensor], spec: LayerSpec, tune: bool
) -> tuple[float, tuple[Case, Config] | None]:
    """Return the seconds of a product, and if other tiles are tried, those of the fastest and which these are."""
    backend = Triton()
    tensors = backend.prepack(stored, spec)
    chosen = graph_seconds(rotating(tensors, lambda own: backend.matmul(x, own, spec)))
    if not tune:
        return chosen, None
    from aptq.kernels.triton.launch import multiply

    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    weight = _weight(tensors, spec)
    case = Case(
        rows=x.shape[0],
        out_features=spec.out_features,
        in_features=spec.in_features,
        bits=weight.bits,
        levels=weight.levels is not None,
        dtype=x.dtype,
        whole_units=weight.group % 32 == 0 or weight.group >= spec.in_features,
        kind=weight.kind,
    )

    def product(config: Config) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda own: multiply(x, _weight(own, spec), config, processors)

    first = choose(case, processors, "")
    found = {
        config: graph_seconds(rotating(tensors, product(config)), replays=5)
        for config in candidates(case)
        if config != first
    }
    if not found:
        return chosen, (case, first)
    best = min(found, key=lambda config: found[config])
    seconds = graph_seconds(rotating(tensors, product(best)))  # the few replays say little of small differences
    if seconds > 0.98 * chosen:
        return chosen, (case, first)
    return seconds, (case, best)


def _weight(tensors: Mapping[str, Tensor], spec: LayerSpec) -> PackedWeight | VectorWeight:
    """Return what the kernels take, as the backend's operators make it."""
    size = spec.option.group_size
    shared = {"in_features": spec.in_features, "group": spec.in_features if size == -1 else size}
    if "codebook" in tensors:
        return VectorWeight(**tensors, out_features=spec.out_features, **shared)
    return PackedWeight(
        **{name: tensor for name, tensor in tensors.items() if name != "scales_below"},
        below=tensors.get("scales_below"),
        **shared,
    )


def _torch_int4(x: Tensor, shape: tuple[int, int]) -> float | None:
    """Return the seconds of torch's own product with 4-bit weights; None where this torch has none for the GPU."""
    try:
        codes = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, device="cuda")
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(shape[1] // GROUP, shape[0], 2, device="cuda", dtype=torch.bfloat16)
        tensors = {"codes": packed, "scales": scales}
        return graph_seconds(
            rotating(tensors, lambda own: torch.ops.aten._weight_int4pack_mm(x, own["codes"], GROUP, own["scales"]))
        )
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        print(f"torch's int4 product does not run {shape}: {str(error).splitlines()[0]}", file=sys.stderr)
        return None


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['shape'][0]}x{row['shape'][1]} rows {row['rows']} {row['format']} {row['bits']}: "
        f"{row['seconds'] * 1e6:.1f} us, dense {row['dense_seconds'] * 1e6:.1f} us"
    )


def page(record: Mapping[str, Any]) -> str:
    """Return the table: a line for each case, its time beside the dense product's, torch's int4 and the roofline."""
    lines = [
        "# The Triton kernels on a GPU",
        "",
        f"{record['device']}, bfloat16, groups of {record['group_size']} where the format has no own, in CUDA graphs,",
        f"weights rotated. `bandwidth` is the share of what a copy reaches ({record['bandwidth'] / 1e12:.2f} TB/s): at",
        "100% the time is that of",
        "reading packed weights and activations."
        + ("" if record.get("finished") else " The time was up before all cases were done."),
        "",
        "| weight | rows | codes | µs | dense µs | x dense | torch int4 µs | bandwidth |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        moved = row["bytes"] + 2 * row["rows"] * sum(row["shape"])
        int4 = f"{row['int4_seconds'] * 1e6:.1f}" if row["int4_seconds"] else ""
        lines.append(
            f"| {row['shape'][0]} x {row['shape'][1]} | {row['rows']} | {row['format']}, {row['bits']} bits "
            f"| {row['seconds'] * 1e6:.1f} | {row['dense_seconds'] * 1e6:.1f} "
            f"| {row['dense_seconds'] / row['seconds']:.2f} | {int4} "
            f"| {moved / row['seconds'] / record['bandwidth']:.0%} |"
        )
    lines += ["", f"torch {record['torch']}, commit {record['commit']}, written by `python benchmarks/kernels.py`."]
    return "\n".join(lines) + "\n"


def _figure(record: Mapping[str, Any]) -> bytes:
    """Return the speed-ups as a PNG file."""
    from aptq.benchmark.figure import draw

    return draw(
        [
            {
                "shape": row["shape"],
                "rows": row["rows"],
                "speedup": row["dense_seconds"] / row["seconds"],
                "backend": row["format"],
                "bits": row["bits"],
                "group_size": record["group_size"],
                "dtype": "bfloat16",
            }
            for row in record["rows"]
        ]
    )


if __name__ == "__main__":
    main()
