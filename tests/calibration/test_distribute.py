"""Owners, and the arithmetic of sums."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric

from aptq.api import AptqError, CurvatureSum
from aptq.calibration.distribute import assign_owners, broadcast_tensors, reduce_to_owners


def _sum(width: int, value: float = 1.0) -> CurvatureSum:
    return CurvatureSum(column=value * torch.eye(width)[None], tokens=10)


def test_layers_that_share_a_sum_have_one_owner() -> None:
    shared = _sum(8)
    owners = assign_owners({"q": shared, "k": shared, "v": shared, "o": _sum(8)}, 2)
    assert owners["q"] == owners["k"] == owners["v"] != owners["o"]


def test_load_is_balanced_by_the_cube_of_the_width() -> None:
    sums = {"down": _sum(16), **{f"small{i}": _sum(8) for i in range(8)}}
    owners = assign_owners(sums, 2)
    other = 1 - owners["down"]
    assert all(owners[f"small{i}"] == other for i in range(8)), "eight small ones weigh as much as the large one"


def test_sums_become_means_per_token_of_the_block() -> None:
    shared = _sum(4, value=6.0)
    curvatures = reduce_to_owners({"a": shared, "b": shared}, {"a": 0, "b": 0}, 3, Fabric(accelerator="cpu", devices=1))
    assert curvatures["a"] is curvatures["b"], "what was shared is factorized once"
    assert torch.equal(curvatures["a"].column[0], 2 * torch.eye(4))
    assert curvatures["a"].tokens == 10


def test_drift_goes_the_way_of_the_curvature() -> None:
    total = _sum(4, value=6.0)
    total.drift = 3.0 * torch.ones(1, 4, 4)
    fabric = Fabric(accelerator="cpu", devices=1)
    drift = reduce_to_owners({"a": total}, {"a": 0}, 3, fabric)["a"].drift
    assert drift is not None
    assert torch.equal(drift, torch.ones(1, 4, 4))
    total.drift.fill_(float("nan"))
    with pytest.raises(AptqError, match="Calibration of a gave NaN"):
        reduce_to_owners({"a": total}, {"a": 0}, 3, fabric)


def test_one_rank_keeps_its_tensors() -> None:
    tensors = {"codes": torch.arange(4)}
    fabric = Fabric(accelerator="cpu", devices=1)
    assert torch.equal(broadcast_tensors(tensors, {"codes": ((4,), torch.int64)}, 0, fabric)["codes"], torch.arange(4))


_TWO_RANKS = """
import torch
from lightning.fabric import Fabric
from aptq.api import CurvatureSum
from aptq.calibration.distribute import reduce_to_owners

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
mine = (fabric.global_rank + 1.0) * torch.ones(1, 4, 4)
total = CurvatureSum(column=mine.clone(), tokens=5, row=3 * mine, drift=2 * mine)
found = reduce_to_owners({"a": total}, {"a": 1}, 10, fabric)
assert list(found) == ["a"] * fabric.global_rank
for curvature in found.values():
    assert curvature.tokens == 10
    parts = (curvature.column, curvature.row, curvature.drift)
    assert [round(float(part.mean()), 5) for part in parts] == [0.3, 0.9, 0.6]
torch.distributed.barrier()  # a rank that leaves while gloo's threads still talk to it takes the other one down
torch.distributed.destroy_process_group()
"""


@pytest.mark.distributed
def test_sums_of_two_ranks_meet_on_the_owner(tmp_path: Path) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(_TWO_RANKS)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
