"""Writing files whole or not at all.

Everything is written under a temporary name in the folder where it belongs, flushed to the disk and renamed, so an
interrupted write leaves the old file or the new one, never half of one. What a killed process left behind starts with
``.tmp-`` and is removed by ``clean_leftovers``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from aptq.errors import AptqError

_ELSEWHERE = "another place (run.dir=..., output=... of evaluate and export, cache_dir=... of what is measured once)"
_LOGGER = logging.getLogger(__name__)
_TEMPORARY = ".tmp-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}


def write_bytes(path: Path, data: bytes, what: str = "data") -> None:
    """Write a file; ``what`` names the content in errors."""
    with _replacing(path, what) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str, what: str = "text") -> None:
    """Write a text file in UTF-8, with line ends as they are."""
    write_bytes(path, text.encode("utf-8"), what)


def write_json(path: Path, data: Any, what: str = "JSON") -> None:
    """Write data as indented JSON.

    Raises:
        ValueError: the data holds NaN or infinity, which JSON has no word for.
    """
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", what)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, what: str = "tensors"
) -> None:
    """Write tensors of any device and stride as a safetensors file."""
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.nbytes() != own.nbytes or (storage.nbytes() and storage.data_ptr() in storages):
            own = own.clone()  # safetensors refuses views and tensors that share memory
        storages.add(own.untyped_storage().data_ptr())
        plain[name] = own
    with _replacing(path, what) as temporary:
        save_file(plain, temporary, metadata=dict(metadata or {}))


@contextmanager
def new_folder(final: Path, what: str = "a folder") -> Iterator[Path]:
    """Give a temporary folder that takes the place of ``final`` when the context ends well, and is gone if not."""
    temporary = _temporary(final)
    try:
        with disk_errors(final, what):
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            replace_folder(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in the place of ``final``; both must lie on one file system."""
    with disk_errors(final, "a folder"):
        for path in (temporary, *temporary.rglob("*")):
            if not path.is_symlink():
                _sync(path)
        old = _temporary(final)
        if final.exists():
            final.rename(old)
        try:
            temporary.rename(final)
        except OSError:
            if old.exists():
                old.rename(final)
            raise
        _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def clean_leftovers(folder: Path) -> None:
    """Remove what interrupted writes left in a folder. Only the process that owns the folder may call this."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        _LOGGER.info("removing %s, left by an interrupted write", path)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_leftover(name: str) -> bool:
    """Say whether a file name is that of an interrupted write."""
    return name.startswith(_TEMPORARY)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path, what: str) -> Iterator[None]:
    """Turn a full or forbidden disk into an ``AptqError`` that names the path, the content and the room left."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number in _FULL:
            raise AptqError(
                f"Could not write {what} to {path}: {os.strerror(number)}; {_free(path)} are free there. What was "
                f"finished before is safe. Make room, or choose {_ELSEWHERE}, and start again."
            ) from error
        if number in _REFUSED:
            raise AptqError(
                f"Could not write {what} to {path}: {os.strerror(number)}. Give yourself the right to write there, or "
                f"choose {_ELSEWHERE}."
            ) from error
        raise


@contextmanager
def _replacing(path: Path, what: str) -> Iterator[Path]:
    temporary = _temporary(path)
    try:
        with disk_errors(path, what):
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_TEMPORARY}{path.name}-{secrets.token_hex(4)}")


def _sync(path: Path) -> None:
    if path.is_dir():
        with suppress(PermissionError):  # Windows opens no folders
            _flush(path)
    else:
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _errno(error: OSError | SafetensorError) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"os error (\d+)", str(error))  # safetensors tells it in words only
    return int(found.group(1)) if found else 0


def _free(path: Path) -> str:
    folder = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
    return f"{shutil.disk_usage(folder).free:,} bytes"
