from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aptq.api import AptqError, LayerSpec, Option
from aptq.backends.reference import Reference
from aptq.benchmark import Benchmark, run_benchmark
from aptq.benchmark.layers import random_weight
from aptq.benchmark.timing import Timing, time_in_turn
from aptq.config import compose
from aptq.decode_times import DecodeTimes
from aptq.experiment import benchmark
from aptq.formats.integer import Integer
from aptq.tables import print_benchmark

FIELDS = [
    *("backend", "format", "bits", "group_size", "shape", "rows", "dtype", "seconds", "dense_bf16_seconds", "speedup"),
    *("relative_error", "bytes", "bandwidth_fraction", "device"),
]
CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"rounds": 2, "seconds": 1e-4}


@dataclass(frozen=True)
class Odd(Reference):
    """Refuses 3 bits and multiplies 4-bit weights wrong."""

    def refuses(self, spec: LayerSpec) -> str | None:
        return "three is odd" if spec.option.bits == 3 else None

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        return super().matmul(x, tensors, spec) * (2 if spec.option.bits == 4 else 1)


def test_rows_are_those_of_right_products_and_refusals_are_told() -> None:
    settings = Benchmark(shapes=[[24, 64]], rows=[1, 3], bits=[2, 3, 4], dtypes=["float32", "bfloat16"], **QUICK)
    told = []
    found = run_benchmark(
        settings,
        Integer(group_size=32),
        "integer",
        {"odd": Odd(), "reference": Reference()},
        CPU,
        lambda done, what: told.append((done, what)),
    )
    assert all(list(row) == FIELDS for row in found.rows)
    timed = {(row["backend"], row["bits"], row["rows"], row["dtype"]) for row in found.rows}
    dtypes = ("float32", "bfloat16")
    expected = {("reference", bits, rows, dtype) for bits in (2, 3, 4) for rows in (1, 3) for dtype in dtypes}
    odd = {("odd", 2, rows, dtype) for rows in (1, 3) for dtype in dtypes}
    assert timed == expected | odd | {("dense", 32, rows, "float32") for rows in (1, 3)}
    reasons = {(refusal.backend, refusal.reason.partition(":")[0]) for refusal in found.refusals}
    assert reasons == {("odd", "three is odd"), ("odd", "its product is wrong")}
    row = next(row for row in found.rows if row["backend"] == "reference" and row["dtype"] == "float32")
    assert row["shape"] == [24, 64]
    assert row["group_size"] == 32
    assert row["relative_error"] < 1e-6
    assert row["speedup"] == pytest.approx(row["dense_bf16_seconds"] / row["seconds"])
    assert row["bytes"] == 24 * 64 * 2 // 8 + 2 * 24 * 2 + 2 * 2 * 4
    assert told[0][0] == 0
    assert told[-1][0] < 3


def test_the_command_writes_rows_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        "benchmark.shapes=[[40,64]]",
        "benchmark.bits=[4]",
        "benchmark.rows=[1]",
        "benchmark.group_size=[32,48]",
    ]
    overrides += ["benchmark.rounds=2", "benchmark.seconds=0.0001", "fabric=cpu", f"run.dir={tmp_path / 'run'}"]
    overrides += [
        "benchmark.backends=[cpu,{name: cpu, activations: int8}]",
        "benchmark.dtypes=[float32]",
        "callback=none",
    ]
    found = benchmark(compose(overrides, "benchmark"))
    rows = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    assert rows == found.rows
    assert {row["backend"] for row in rows} == {"cpu", "cpu activations=int8", "dense"}
    assert (tmp_path / "run" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    print_benchmark(found, tmp_path / "run")
    assert "not of 48" in capsys.readouterr().out.replace("\n", " ")


def test_a_models_own_shapes_are_timed(tiny_model_folder: Any, tmp_path: Path) -> None:
    folder = tiny_model_folder("llama")
    overrides = [
        f"benchmark.model={folder}",
        "benchmark.bits=[4]",
        "benchmark.rows=[1]",
        "benchmark.backends=[reference]",
    ]
    overrides += ["benchmark.rounds=1", "benchmark.seconds=0.0001", "fabric=cpu", f"run.dir={tmp_path / 'run'}"]
    found = benchmark([*overrides, "callback=none", "benchmark.dtypes=[float32]"])
    shapes = {tuple(row["shape"]) for row in found.rows}
    assert len(shapes) > 1
    assert (4096, 4096) not in shapes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shapes": [[0, 4]]}, "all of them positive"),
        ({"shapes": [[4, 4]], "bits": []}, "bits is empty"),
        ({"shapes": [[4, 4]], "dtypes": ["float8"]}, "float8; use some of float32"),
        ({"shapes": [[4, 4]], "rounds": 0}, "rounds=0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AptqError, match=message):
        Benchmark(**settings)


def test_contenders_are_timed_in_turn() -> None:
    order: list[str] = []

    def call(name: str) -> Tensor:
        order.append(name)
        return torch.empty(0)

    found = time_in_turn({"a": [lambda: call("a")], "b": [lambda: call("b")]}, 3, 1e-6, CPU)
    assert set(found) == {"a", "b"}
    runs = [name for at, name in enumerate(order) if at == 0 or order[at - 1] != name]
    assert runs == ["a", "b"] * 4
    assert Timing.of([3.0]) == Timing(median=3.0, best=3.0, low=3.0, high=3.0)


def test_a_weight_that_cannot_be_stored_is_refused() -> None:
    with pytest.raises(AptqError, match="2 to 8 bits"):
        random_weight(Integer(), Option(9, 32), (8, 32), CPU, 0)


def test_times_of_several_formats_are_a_budget_for_plans_of_them(tmp_path: Path) -> None:
    overrides = [
        "benchmark.shapes=[[40,64]]",
        "benchmark.bits=[4,8]",
        "benchmark.rows=[1,2]",
        "format=mixed",
        "fabric=cpu",
    ]
    overrides += ["benchmark.rounds=1", "benchmark.seconds=0.0001", "benchmark.dtypes=[float32]", "callback=none"]
    benchmark([*overrides, "benchmark.backends=[reference]", f"run.dir={tmp_path / 'run'}"])
    options = [Option(4, 64, "integer"), Option(8, 64, "integer"), Option(4, 64, "asymmetric_float")]
    found = DecodeTimes.read(tmp_path / "run" / "benchmark.json").of({"a": (40, 64)}, options)["a"]
    assert found.keys() == set(options), "asymmetric_float has no 8 bits"
    assert min(found.values()) > 0
