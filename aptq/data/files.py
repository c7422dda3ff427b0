"""Find text files and read them piece by piece.

A *text* is an iterator of pieces whose concatenation is the text; a piece is what may be parted from the rest: a
document of a ``.jsonl`` or ``.parquet`` file, a paragraph of a ``.txt`` file. Pieces come one by one, so that a file
larger than memory can be read. Documents are parted by a blank line; a ``.txt`` file is its own text, unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from aptq.errors import AptqError

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
SEPARATOR = "\n\n"


def concatenated(texts: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield the pieces of one text after the other, with a blank line between texts."""
    for index, text in enumerate(texts):
        start = SEPARATOR if index else ""
        for piece in text:
            yield start + piece
            start = ""


def find_files(paths: Any, key: str) -> list[Path]:
    """Return the files that a path, a glob or a list of them names, each once; those of a glob sorted by name.

    Args:
        paths: what the config holds.
        key: where in the config it stands, for messages.

    Raises:
        AptqError: nothing was given, or something given is no file.
    """
    given = [paths] if isinstance(paths, str | Path) else paths
    if not isinstance(given, list | tuple) or not given or not all(isinstance(item, str | Path) for item in given):
        raise AptqError(
            f"{key}={paths!r} names no file. Allowed: a file, a glob such as 'texts/*.txt', or a list of them."
        )
    found: dict[Path, None] = {}
    for item in given:
        found.update(dict.fromkeys(_expand(str(item), key)))
    return list(found)


def _expand(item: str, key: str) -> list[Path]:
    path = Path(item).expanduser()
    if item and path.is_file():  # first, for names that contain a bracket
        return [path]
    if item and any(character in item for character in "*?["):
        base = Path(path.anchor)
        try:
            files = sorted(match for match in base.glob(str(path.relative_to(base))) if match.is_file())
        except ValueError as error:
            raise AptqError(f"{key}={item} is no valid glob: {error}. Write it as in 'texts/**/*.txt'.") from error
        if not files:
            raise AptqError(f"{key}={item}: no file matches. Relative paths start at {Path.cwd()}.")
        return files
    if item and path.is_dir():
        raise AptqError(f"{key}={item} is a folder. Name the files in it, with a glob such as '{path / '*.txt'}'.")
    raise AptqError(
        f"{key}={item or repr(item)}: there is no such file.{_near(path)} Relative paths start at {Path.cwd()}."
    )


def _near(path: Path) -> str:
    """Return a hint at names like the first part of the path that does not exist."""
    missing = path.absolute()
    while not missing.parent.is_dir():
        missing = missing.parent
    try:
        names = sorted(entry.name for entry in missing.parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        return ""
    close = get_close_matches(missing.name, names, n=3)
    if close:
        return f" Did you mean {' or '.join(str(missing.parent / name) for name in close)}?"
    readable = [name for name in names if Path(name).suffix in SUFFIXES][:5]
    return f" {missing.parent} has {', '.join(readable)}." if readable else f" {missing.parent} has no text files."


def check_file(path: Path, field: str) -> None:
    """Raise ``AptqError`` unless a file is of a kind that can be read and begins with some text."""
    if path.suffix.lower() not in SUFFIXES:
        raise AptqError(
            f"{path} cannot be read as text: its suffix is {path.suffix or 'missing'}. Allowed: {', '.join(SUFFIXES)} "
            "(.json with one object a line). Convert or rename the file."
        )
    if not any(piece.strip() for piece in read_text(path, field)):
        raise AptqError(f"{path} is empty: no text is in it. Give a file with text.")


def read_text(path: Path, field: str) -> Iterator[str]:
    """Yield the text of a file in pieces.

    Args:
        path: a file with one of ``SUFFIXES``.
        field: the key or column that holds the text, in formats that have one.

    Raises:
        AptqError: the file does not hold what its suffix says, or lacks the field.
    """
    try:
        match path.suffix.lower():
            case ".txt":
                yield from _paragraphs(path)
            case ".parquet":
                yield from concatenated([row] for row in _parquet(path, field))
            case _:
                yield from concatenated([row] for row in _json_lines(path, field))
    except UnicodeDecodeError as error:
        raise AptqError(f"{path} is not UTF-8 text: {error}. Convert it to UTF-8.") from error
    except OSError as error:
        raise AptqError(f"{path} cannot be read: {error}.") from error


def _paragraphs(path: Path) -> Iterator[str]:
    """Yield a file's paragraphs with the blank lines after them, or its lines where no blank line parts it."""
    with path.open(encoding="utf-8-sig") as file:
        lines_are_paragraphs = not _has_inner_blank(file)
        file.seek(0)
        paragraph: list[str] = []
        for line in file:
            if paragraph and line.strip() and (lines_are_paragraphs or not paragraph[-1].strip()):
                yield "".join(paragraph)
                paragraph = []
            paragraph.append(line)
        if paragraph:
            yield "".join(paragraph)


def _has_inner_blank(lines: Iterable[str]) -> bool:
    seen_text = seen_blank = False
    for line in lines:
        if not line.strip():
            seen_blank = seen_text
        elif seen_blank:
            return True
        else:
            seen_text = True
    return False


def _json_lines(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise AptqError(f"{where}: no JSON ({error}). Allowed: one JSON object a line.") from error
            if not isinstance(row, dict):
                raise AptqError(f"{where}: a JSON {type(row).__name__}. Allowed: one JSON object a line.")
            yield text_of(row, field, where)


def _parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                text_of(dict.fromkeys(file.schema_arrow.names), field, str(path))
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for number, text in enumerate(batch.column(0).to_pylist()):
                    yield "" if text is None else text_of({field: text}, field, f"{path}, row {number} of a batch")
    except pyarrow.ArrowException as error:
        raise AptqError(f"{path} is no parquet file that can be read: {error}") from error


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    """Return the text in a row, or say which fields there are."""
    if field not in row:
        close = get_close_matches(field, [str(key) for key in row], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise AptqError(
            f"{where}: no field {field!r}.{hint} Fields there: {', '.join(map(str, row)) or 'none'}. "
            "Set data.text_field to the one that holds the text."
        )
    text = row[field]
    if not isinstance(text, str):
        raise AptqError(f"{where}: {field!r} holds a {type(text).__name__}, not text. Set data.text_field to another.")
    return text
