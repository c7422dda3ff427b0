import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from aptq.api import AptqError
from aptq.data.files import check_file, concatenated, find_files, read_text


def text(path: Path, field: str = "text") -> str:
    return "".join(read_text(path, field))


def test_text_is_read_unchanged_and_parted_at_blank_lines(tmp_path: Path) -> None:
    content = "\n\nTitle\n\nOne line,\nthe next.\n \n\n  Indented\n"
    path = tmp_path / "a.txt"
    path.write_text(content, encoding="utf-8")
    pieces = list(read_text(path, "text"))
    assert "".join(pieces) == content
    assert [piece.strip() for piece in pieces if piece.strip()] == ["Title", "One line,\nthe next.", "Indented"]


def test_text_without_blank_lines_is_parted_at_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")  # byte order mark and Windows line ends, as editors leave them
    assert list(read_text(path, "text")) == ["one\n", "two\n"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_documents_of_json_lines_are_parted_by_blank_lines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text('{"text": "one"}\n\n{"text": "two\\nlines"}\n', encoding="utf-8")
    assert text(path) == "one\n\ntwo\nlines"


def test_parquet_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", None, "two"], "id": [1, 2, 3]}), path)
    assert text(path, "body") == "one\n\n\n\ntwo"
    with pytest.raises(AptqError, match=r"no field 'boddy'. Did you mean 'body'\? Fields there: body, id"):
        check_file(path, "boddy")
    with pytest.raises(AptqError, match="'id' holds a int, not text"):
        check_file(path, "id")


def test_concatenated_puts_a_blank_line_between_texts_only() -> None:
    assert "".join(concatenated([["a", "b"], ["c"], ["d", "e"]])) == "ab\n\nc\n\nde"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"x", r"suffix is .pdf. Allowed: .txt, .jsonl"),
        ("a", b"x", r"suffix is missing"),
        ("a.txt", b"", r"is empty: no text"),
        ("a.txt", b" \n\n", r"is empty: no text"),
        ("a.jsonl", b'{"text": "  "}\n', r"is empty: no text"),
        ("a.txt", b"caf\xe9", r"is not UTF-8 text.*Convert it"),
        ("a.jsonl", b"{text: 1}\n", r"a.jsonl, line 1: no JSON .* Allowed: one JSON object a line"),
        ("a.json", b'[{"text": "x"}]', r"line 1: a JSON list. Allowed: one JSON object a line"),
        ("a.jsonl", b'{"txt": "x"}\n', r"line 1: no field 'text'. Did you mean 'txt'\?"),
        ("a.jsonl", b'{"text": 3}\n', r"'text' holds a int, not text"),
        ("a.parquet", b"no parquet", r"is no parquet file that can be read"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(AptqError, match=message):
        check_file(path, "text")


def test_find_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "a[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x", encoding="utf-8")
    (tmp_path / "folder.txt").mkdir()
    monkeypatch.chdir(tmp_path / "sub")

    def names(paths: object) -> list[str]:
        return [path.name for path in find_files(paths, "data.path")]

    assert names("../b.txt") == ["b.txt"]
    assert names("../?.txt") == ["a.txt", "b.txt"]
    assert names(str(tmp_path / "**/*.txt")) == ["a.txt", "a[1].txt", "b.txt", "c.txt"]
    assert names([str(tmp_path / "b.txt"), str(tmp_path / "?.txt")]) == ["b.txt", "a.txt"]
    assert names(str(tmp_path / "a[1].txt")) == ["a[1].txt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("validaton.jsonl", r"data.path=validaton.jsonl: there is no such file. Did you mean .*validation.jsonl\?"),
        ("subb/c.txt", r"Did you mean .*sub\?"),
        ("nothing-like-it", r"has validation.jsonl"),
        ("*.parquet", r"no file matches"),
        ("**.txt/[", r"no valid glob|no file matches"),
        ("sub", r"is a folder. .*glob such as"),
        ("", r"no such file"),
        ([], r"names no file. Allowed: a file, a glob"),
        (3, r"names no file"),
        ([3], r"names no file"),
    ],
)
def test_names_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: object, message: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "validation.jsonl").write_text(json.dumps({"text": "x"}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AptqError, match=message):
        find_files(given, "data.path")
