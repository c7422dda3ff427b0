"""Plain values become what annotations say, or an error that names the place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from aptq.errors import AptqError
from aptq.typed import arguments, convert, keys_of, nearest


@dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Outer:
    path: str
    rate: float = 0.5
    inner: Inner = Inner()
    names: list[str] = field(default_factory=lambda: ["a"])


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (1234567, str, "1234567"),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([1, "a"], tuple[int, str], (1, "a")),
        ((1, 2), list[float], [1.0, 2.0]),
        ({"a": [1]}, dict[str, list[int]], {"a": [1]}),
        (None, int | None, None),
        (2, str | int, 2),
        ("x/y", Path, Path("x/y")),
        ("b", Literal["a", "b"], "b"),
        (True, bool, True),
        ({"size": 3}, Inner, Inner(3)),
        ({"size": 3}, Inner | None, Inner(3)),
        ([object], Any, [object]),
    ],
)
def test_converts(value: Any, annotation: Any, expected: Any) -> None:
    result = convert(value, annotation, "here")
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "told"),
    [
        (True, int, "whole number"),
        (3.5, int, "3.5 .*whole number"),
        ("3", int, "whole number"),
        (True, float, "a number"),
        (1, bool, "true or false"),
        (1e10, str, "text"),
        (None, str, "null .*text"),
        ("ab", list[str], "a list of: text"),
        ([1, None], list[int], r"at \[1\]"),
        ([1, 2, 3], tuple[int, int], "a list"),
        ({"a": "x"}, dict[str, int], "at key 'a'"),
        ("c", Literal["a", "b"], "one of 'a', 'b'"),
        (True, Literal[1, 2], "one of 1, 2"),
    ],
)
def test_refuses(value: Any, annotation: Any, told: str) -> None:
    with pytest.raises(AptqError, match=f"^here cannot be .*{told}"):
        convert(value, annotation, "here")


def test_lists_keys_with_defaults() -> None:
    keys, open_ended = keys_of(Outer)
    assert [str(key) for key in keys.values()] == ["path (required)", "rate=0.5", "inner=Inner(size=1)", "names=['a']"]
    assert not open_ended


def test_names_missing_keys() -> None:
    with pytest.raises(AptqError, match=r"outer needs a value for 'path'\. Its keys: path \(required\), rate=0\.5"):
        arguments(Outer, {"rate": 1}, "outer")


def test_names_unknown_keys_inside() -> None:
    with pytest.raises(AptqError, match="no key 'sise'. Did you mean 'size'"):
        arguments(Outer, {"path": "x", "inner": {"sise": 3}}, "outer")


def test_functions_may_take_any_key() -> None:
    def open_ended(first: int = 0, **others: Any) -> None: ...

    assert arguments(open_ended, {"first": 1, "other": "x"}, "it") == {"first": 1, "other": "x"}


def test_no_name_is_suggested_when_none_is_close() -> None:
    assert nearest("zzzz", ["gptq", "nearest"]) == ""
