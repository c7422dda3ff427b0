from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from aptq.api import AptqError
from aptq.kernels.operators import OPERATORS
from aptq.kernels.triton import read_table
from aptq.kernels.triton.configs import (
    DENSE,
    DENSE_VECTORS,
    DOTS,
    FOUR_ROWS,
    LOOKED_UP,
    ONE_ROW,
    SHIPPED,
    VECTORS,
    Case,
    Config,
    choose,
    write_table,
)

HALF, FULL = torch.bfloat16, torch.float32
REGISTERS = {"gemv": 128, "dot": 255, "dense": 128}  # of one row; of more rows twice as many
PER_WEIGHT = {"zeros": 6.3, "symmetric": 6.0, "levels": 6.0, "two-sided": 8.0}  # of the worst width and GPU
PER_WEIGHT |= {"states of 10": 8.5, "states of 12": 7.0, "codebooks": 7.2, "levels in 16": 5.9}
PER_WEIGHT |= {"vectors of 8": 4.6, "residual vectors of 4": 9.4}
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "kernels_compiled.json"


def test_in_the_interpreter() -> None:
    """In a process of its own: Triton interprets or compiles, as it was told when it was imported."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'aptq[gpu]'")
    tests = [Path(__file__).parent / "triton" / f"{name}.py" for name in ("interpreted", "interpreted_tables")]
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *map(str, tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tests[0].parents[3], check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def case(
    rows: int,
    dtype: torch.dtype = HALF,
    shape: tuple[int, int] = (8192, 8192),
    whole_units: bool = True,
    kind: str = "",
) -> Case:
    return Case(
        rows=rows,
        out_features=shape[0],
        in_features=shape[1],
        bits=4,
        levels=False,
        dtype=dtype,
        whole_units=whole_units,
        kind=kind,
    )


def test_rules_of_thumb() -> None:
    chosen = {rows: choose(case(rows), 132, "") for rows in (1, 2, 3, 16, 17, 33, 64, 65)}
    assert chosen[1] == ONE_ROW[0]
    assert chosen[2].rows == 2
    assert [chosen[rows] for rows in (3, 16, 17, 33, 64)] == [DOTS[16], DOTS[16], DOTS[32], DOTS[64], DOTS[64]]
    assert chosen[65] == DENSE
    assert choose(case(1, shape=(576, 576)), 132, "") == ONE_ROW[-1], "a small layer has small tiles"
    assert choose(case(8, FULL), 132, "") == FOUR_ROWS[0], "tensor cores would round float32"
    assert choose(case(9, FULL), 132, "") == DENSE
    assert choose(case(16, whole_units=False), 132, "") == DENSE


def test_rules_of_thumb_for_values_that_are_looked_up() -> None:
    for kind, tiles in (("states", LOOKED_UP), ("blocks", LOOKED_UP), ("vectors", VECTORS)):
        for rows, of_program in ((2, 2), (3, 4), (8, 4)):
            assert choose(case(rows, kind=kind), 132, "") == tiles[of_program]
    assert choose(case(1, kind="states"), 132, "") == LOOKED_UP[1]
    assert choose(case(1, kind="blocks"), 132, "") == ONE_ROW[0]
    assert choose(case(1, kind="blocks", shape=(576, 576)), 132, "") == ONE_ROW[-1]
    assert choose(case(9, kind="states"), 132, "") == DENSE
    assert choose(case(9, kind="vectors"), 132, "") == DENSE_VECTORS


def test_a_table_goes_before_the_rules(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    measured = Config(kernel="gemv", rows=2, units=1)
    write_table(path, "Some GPU", [(case(6), measured)])
    for rows in (5, 6, 8):
        assert choose(case(rows), 132, str(path)) == measured
    assert choose(case(9), 132, str(path)) == DOTS[16]
    assert choose(case(8, FULL), 132, str(path)) == FOUR_ROWS[0]
    assert choose(case(6, kind="states"), 132, str(path)) == LOOKED_UP[4], "it is of other kernels"


@pytest.mark.parametrize("text", ["", "{}", '{"entries": [{"case": [1], "config": {"kernel": "magic"}}]}'])
def test_what_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(AptqError, match=r"no tuning table|kernel 'magic'"):
        read_table(str(path))
    with pytest.raises(AptqError, match=r"no tuning table.*FileNotFoundError"):
        read_table(str(tmp_path / "none.json"))


def test_the_operator_has_a_fake() -> None:
    with torch.device("meta"):
        weight = torch.empty(2, 4, 40, dtype=torch.int32), torch.empty(2, 40)
        y = torch.ops.aptq.triton_matmul(torch.empty(3, 5, 64, dtype=HALF), *weight, None, None, None, 32, "")
        states = torch.ops.aptq.triton_states_matmul(torch.empty(3, 5, 64, dtype=HALF), *weight, torch.empty(9), 32, "")
        vectors = torch.empty(2, 4, 5, dtype=torch.int32), torch.empty(1, 16, 8), None, None, None, None
        of_vectors = torch.ops.aptq.triton_vectors_matmul(torch.empty(3, 5, 64, dtype=HALF), *vectors, 40, 32, "")
    for found in (y, states, of_vectors):
        assert found.shape == (3, 5, 40)
        assert found.dtype == HALF
    assert OPERATORS.ns == "aptq"


def compiled(jobs: list[tuple[Config, int, str, int]]) -> list[dict[str, float]]:
    """Compile in a process that does not interpret, whatever this one does."""
    code = """
import json, sys
from aptq.kernels.triton.compiled import compile_config
from aptq.kernels.triton.configs import Config
for config, bits, meaning, capability in json.load(sys.stdin):
    found = compile_config(Config(**config), bits, meaning, capability)
    fields = ("registers", "stack", "weights", "words", "per_weight", "wide_loads", "tensor_cores")
    print(json.dumps({name: getattr(found, name) for name in fields} | {"moved": found.count("LDL", "STL")}))
"""
    given = json.dumps([[vars(config), *rest] for config, *rest in jobs])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_gates(jobs: list[tuple[Config, int, str, int]]) -> None:
    """No spills to speak of, registers for some programs at once, wide loads, tensor cores, few instructions."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'aptq[gpu]'")
    for job, found in zip(jobs, compiled(jobs), strict=True):
        assert_gate(job, found)


def assert_gate(job: tuple[Config, int, str, int], found: Mapping[str, float]) -> None:
    config, _, meaning, _ = job
    allowed = REGISTERS[config.kernel] * (2 if config.rows > 1 else 1)
    assert found["registers"] <= min(allowed, 255), job
    assert found["stack"] <= 8, job  # the assembler puts one predicate or register there now and then
    assert found["moved"] <= 1, job
    # "dot" copies into shared memory meanwhile, whatever is a thread's share; of vectors a thread may have one
    if config.kernel != "dot" and "vectors" not in meaning:
        assert found["wide_loads"] >= found["words"] // 4, job
    assert (found["tensor_cores"] > 0) == (config.kernel == "dot"), job
    if config.kernel == "gemv" and config.rows == 1:
        assert found["per_weight"] <= PER_WEIGHT[meaning], job


def test_compiled_for_gpus_that_are_not_here() -> None:
    assert_gates(
        [
            (ONE_ROW[0], 4, "zeros", 90),
            (ONE_ROW[0], 3, "zeros", 80),
            (ONE_ROW[0], 2, "symmetric", 100),
            (ONE_ROW[0], 4, "levels", 90),
            (DOTS[16], 4, "zeros", 90),
            (DOTS[16], 3, "levels", 80),
            (DENSE, 3, "zeros", 90),
        ]
    )


def test_tables_compiled_for_gpus_that_are_not_here() -> None:
    assert_gates(
        [
            (LOOKED_UP[1], 2, "states of 10", 90),
            (LOOKED_UP[4], 2, "states of 12", 80),
            (ONE_ROW[0], 4, "codebooks", 90),
            (LOOKED_UP[4], 4, "levels in 16", 100),
            (VECTORS[1], 8, "vectors of 8", 90),
        ]
    )


def test_results_hold_the_gates_and_are_of_these_sources() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'aptq[gpu]'")
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    found = runpy.run_path(str(RESULTS.parents[1] / "kernel_compilation.py"))
    assert record["sources"] == found["digests"](), "run benchmarks/kernel_compilation.py, and commit what it writes"
    cases = {(json.dumps(vars(config)), *rest) for config, *rest in found["cases"]([80, 90, 100])}
    rows = {(json.dumps(row["config"]), row["bits"], row["meaning"], row["capability"]): row for row in record["rows"]}
    assert set(rows) == cases
    for (_, _, meaning, _), row in rows.items():
        job = Config(**row["config"]), row["bits"], meaning, row["capability"]
        assert_gate(job, {**row, "moved": row["spills"]})


@pytest.mark.slow
@pytest.mark.parametrize("config", SHIPPED, ids=str)
def test_every_shipped_config_compiled(config: Config) -> None:
    codes = [(bits, meaning) for bits in (2, 3, 4, 8) for meaning in ("zeros", "symmetric")]
    codes += [(bits, meaning) for bits in (2, 3, 4) for meaning in ("levels", "two-sided")]
    assert_gates([(config, *code, capability) for code in codes for capability in (80, 90, 100)])
