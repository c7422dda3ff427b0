"""Files are written whole or not at all, and a full disk is told in words."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aptq.errors import AptqError
from aptq.files import clean_leftovers, new_folder, replace_folder, sha256, write_json, write_tensors, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_replace_the_old_file_and_leave_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "a.txt", "new ü\n")
    write_json(tmp_path / "a.json", {"key": [1, None, "ü"]})
    assert (tmp_path / "a.txt").read_bytes() == "new ü\n".encode()
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"key": [1, None, "ü"]}
    assert names(tmp_path) == ["a.json", "a.txt"]


def test_json_without_a_word_for_a_number_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_tensors_may_be_views_share_memory_and_have_any_stride(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    tensors = {"whole": base, "again": base, "row": base[1], "turned": base.T, "empty": torch.zeros(0, 4)}
    write_tensors(tmp_path / "t.safetensors", tensors, {"why": "test"})
    loaded = load_file(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert names(tmp_path) == ["t.safetensors"]


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.txt", "old")

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_what_a_killed_process_left_is_cleaned(tmp_path: Path) -> None:
    (tmp_path / ".tmp-a.txt-1234").write_text("half")
    (tmp_path / ".tmp-model-1234").mkdir()
    (tmp_path / ".tmp-model-1234" / "part").write_text("half")
    (tmp_path / "a.txt").write_text("whole")
    clean_leftovers(tmp_path)
    assert names(tmp_path) == ["a.txt"]
    clean_leftovers(tmp_path / "missing")


def test_a_full_disk_names_the_path_the_content_and_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        AptqError, match=r"Could not write the plan to .*plan\.txt: No space left.* bytes are free"
    ) as raised:
        write_text(tmp_path / "plan.txt", "x", "the plan")
    assert "Make room" in str(raised.value)
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_tensors_that_outgrow_the_room_are_told_as_a_full_disk(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, torch; from pathlib import Path; from aptq.files import write_tensors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: write_tensors(Path(sys.argv[1]), {'x': torch.zeros(4096)}, what='block 3')\n"
        "except Exception as error: sys.stdout.write(f'{type(error).__name__}: {error}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "b.safetensors")], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("AptqError: Could not write block 3")
    assert names(tmp_path) == []


def test_a_folder_takes_the_place_of_the_old_one_whole(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with new_folder(final) as folder:
        (folder / "old").write_text("1")
    with new_folder(final) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "new").write_text("2")
        assert names(final) == ["old"]
    assert names(final) == ["deep"]
    assert names(tmp_path) == ["model"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "model"
    (tmp_path / "ready").mkdir()
    replace_folder(tmp_path / "ready", final)

    def fail() -> None:
        with new_folder(final) as folder:
            (folder / "half").write_text("1")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert names(final) == []
    assert names(tmp_path) == ["model"]


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")
