"""Write safetensors shards tensor by tensor: the layout is planned from shapes, so no more than one is in memory.

The file format is that of https://github.com/huggingface/safetensors: a little-endian 64-bit length, a JSON header of
that length, the tensors' bytes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from aptq.errors import AptqError

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class TensorInfo:
    """What has to be known of a tensor to place it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorInfo:
        """Return what is to be known of a tensor at hand."""
        return cls(name, tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Shard:
    """One file and the tensors in it."""

    file: str = ""
    tensors: list[TensorInfo] = field(default_factory=list)
    nbytes: int = 0

    def header(self) -> tuple[bytes, dict[str, int]]:
        """Return the bytes before the data, and where in the file each tensor begins.

        Wide dtypes come first, so that every tensor is aligned to its own element.
        """
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets: dict[str, int] = {}
        at = 0
        for info in sorted(self.tensors, key=lambda info: (-info.dtype.itemsize, info.name)):
            span = [at, at + info.nbytes]
            entries[info.name] = {"dtype": DTYPES[info.dtype], "shape": list(info.shape), "data_offsets": span}
            offsets[info.name] = at
            at += info.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + at for name, at in offsets.items()}


def parse_size(size: str | int) -> int:
    """Return bytes for a size such as "4GB"; raise ``AptqError`` when it is none."""
    if isinstance(size, int):
        number, unit = float(size), 1
    else:
        text = size.strip().upper()
        unit = _UNITS.get(text[-2:], 0)
        try:
            number = float(text[:-2])
        except ValueError:
            unit = 0
    if unit == 0 or not math.isfinite(number * unit) or number * unit < 1:
        raise AptqError(f"max_shard_size={size!r} is no size; use a number of bytes, or one with {', '.join(_UNITS)}.")
    return int(number * unit)


def plan_shards(tensors: Iterable[TensorInfo], max_bytes: int) -> list[Shard]:
    """Fill shards in the order of the tensors; one that is larger than ``max_bytes`` gets a shard of its own.

    Raises:
        AptqError: when a name comes twice or a dtype cannot be stored.
    """
    shards = [Shard()]
    seen: set[str] = set()
    for info in tensors:
        if info.name in seen:
            raise AptqError(f"Two tensors are named {info.name}; a checkpoint can hold one.")
        if info.dtype not in DTYPES:
            raise AptqError(f"{info.name} has dtype {info.dtype}, which safetensors cannot store.")
        seen.add(info.name)
        if shards[-1].tensors and shards[-1].nbytes + info.nbytes > max_bytes:
            shards.append(Shard())
        shards[-1].tensors.append(info)
        shards[-1].nbytes += info.nbytes
    for number, shard in enumerate(shards, 1):
        whole = len(shards) == 1
        shard.file = "model.safetensors" if whole else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    return shards


def write_shards(folder: Path, shards: list[Shard], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write the planned files, and the index when there are several; everything is on disk when this returns.

    Args:
        folder: where to.
        shards: what ``plan_shards`` gave.
        tensors: the tensors in any order; fastest in the order of the plan.

    Raises:
        AptqError: when the disk is full; says how much is needed and how much is free.
    """
    total = sum(shard.nbytes for shard in shards)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise _full(folder, total, free)
    with explain_full_disk(folder, total):
        _write_data(folder, shards, tensors)
        if len(shards) > 1:
            where = {info.name: shard.file for shard in shards for info in shard.tensors}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush every file of a folder, and the folder itself, to the disk."""
    for path in [*(path for path in folder.iterdir() if path.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write_data(folder: Path, shards: list[Shard], tensors: Iterable[tuple[str, Tensor]]) -> None:
    places: dict[str, tuple[Path, int, TensorInfo]] = {}
    for shard in shards:
        header, offsets = shard.header()
        with (folder / shard.file).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + shard.nbytes)
        places.update((info.name, (folder / shard.file, offsets[info.name], info)) for info in shard.tensors)
    for name, tensor in tensors:
        path, offset, info = places.pop(name)
        if (tensor.dtype, tuple(tensor.shape)) != (info.dtype, info.shape):
            raise RuntimeError(f"{name} was planned as {info}, but is {tensor.dtype} {tuple(tensor.shape)}")
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if places:
        raise RuntimeError(f"planned tensors never came: {', '.join(places)}")


@contextmanager
def explain_full_disk(folder: Path, needed: int) -> Iterator[None]:
    """Turn "no space left" into an ``AptqError`` that says how many bytes are needed and free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _full(folder, needed, shutil.disk_usage(folder).free) from error


def _full(folder: Path, needed: int, free: int) -> AptqError:
    return AptqError(
        f"The checkpoint needs {needed:,} bytes in {folder}, but {free:,} are free. Free some space, or write the run "
        "to another disk; finished blocks are kept, so the run can be taken up again."
    )
