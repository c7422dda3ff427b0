from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from aptq.errors import AptqError
from aptq.shards import DTYPES, TensorInfo, parse_size, plan_shards, write_shards


def infos(tensors: dict[str, Tensor]) -> list[TensorInfo]:
    return [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def some(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.arange(torch.Size(shape).numel()) % 7).reshape(shape).to(dtype)


def test_the_safetensors_library_reads_every_dtype_and_odd_shape(tmp_path: Path) -> None:
    tensors = {f"t.{number}": some(dtype, 3, 5) for number, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "view": some(torch.float32, 4, 6).T}
    write_shards(tmp_path, plan_shards(infos(tensors), 10**9), tensors.items())
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].float(), tensor.float())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_keep_to_the_size_and_the_index_names_every_tensor(tmp_path: Path) -> None:
    tensors = {f"t{number}": some(torch.int16, 25) for number in range(7)} | {"large": some(torch.float32, 100)}
    shards = plan_shards(infos(tensors), 150)
    assert [len(shard.tensors) for shard in shards] == [3, 3, 1, 1]
    write_shards(tmp_path, shards, reversed(tensors.items()))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 750
    assert index["weight_map"].keys() == tensors.keys()
    assert set(index["weight_map"].values()) == {f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(AptqError, match="Two tensors are named a"):
        plan_shards([TensorInfo("a", torch.float32, (1,)), TensorInfo("a", torch.float32, (1,))], 100)


def test_a_dtype_that_cannot_be_stored_is_refused() -> None:
    with pytest.raises(AptqError, match="complex64"):
        plan_shards([TensorInfo("a", torch.complex64, (1,))], 100)


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=99)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    tensors = {"a": some(torch.float32, 100)}
    with pytest.raises(AptqError, match="needs 400 bytes .* 99 are free"):
        write_shards(tmp_path, plan_shards(infos(tensors), 10**9), tensors.items())
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_while_writing_is_explained(tmp_path: Path) -> None:
    tensors = {"a": some(torch.float32, 100)}

    def filling() -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    with pytest.raises(AptqError, match="needs 400 bytes"):
        write_shards(tmp_path, plan_shards(infos(tensors), 10**9), filling())


def test_other_trouble_of_the_disk_is_not_called_full(tmp_path: Path) -> None:
    tensors = {"a": some(torch.float32, 100)}
    with pytest.raises(FileNotFoundError):
        write_shards(tmp_path / "gone", plan_shards(infos(tensors), 10**9), tensors.items())


@pytest.mark.parametrize(("size", "expected"), [("4GB", 4 * 10**9), ("1.5 mb", 1_500_000), (123, 123)])
def test_sizes_are_read(size: str | int, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "4", "4GiB", "-1GB", "nanGB", 0])
def test_what_is_no_size_is_refused(size: str | int) -> None:
    with pytest.raises(AptqError, match="max_shard_size"):
        parse_size(size)
