"""Times of layers, from the table of the benchmark to the budget of a plan."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from aptq.allocators.knapsack import Knapsack
from aptq.api import AptqError, Option
from aptq.decode_times import DecodeTimes

SHAPES = {"a": (8, 4), "b": (4, 8)}
OPTIONS = [Option(2, 64, "integer"), Option(4, 64, "integer")]


def row(bits: int, seconds: float, shape: tuple[int, int] = (8, 4), **changes: Any) -> dict[str, Any]:
    return {
        **{"backend": "cpu", "format": "integer", "bits": bits, "group_size": 64, "shape": list(shape), "rows": 1},
        **{"dtype": "float32", "seconds": seconds, "device": "some machine"},
        **changes,
    }


ROWS = [row(bits, bits * seconds, shape) for bits in (2, 4) for shape, seconds in (((8, 4), 1e-3), ((4, 8), 2e-3))]


def test_the_fastest_backend_counts_unless_one_is_named() -> None:
    rows = [*ROWS, row(2, 1e-4, backend="other"), row(4, 1.0, backend="other"), row(2, 1e-9, rows=16)]
    found = DecodeTimes(Path("x"), rows).of({"a": (8, 4)}, OPTIONS)
    assert found == {"a": {OPTIONS[0]: 1e-4, OPTIONS[1]: 4e-3}}
    assert DecodeTimes(Path("x"), rows, "cpu").of(SHAPES, OPTIONS)["a"][OPTIONS[0]] == 2e-3
    with pytest.raises(AptqError, match="no times of decoding .* backend=third"):
        DecodeTimes(Path("x"), rows, "third")


def test_the_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps(ROWS))
    assert DecodeTimes.read(path).of(SHAPES, OPTIONS)["b"] == {OPTIONS[0]: 4e-3, OPTIONS[1]: 8e-3}


@pytest.mark.parametrize(
    ("content", "told"), [("[", "cannot be read"), ("{}", "no table"), ('[{"bits": 3}]', "no table")]
)
def test_a_file_of_something_else_is_refused(content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "benchmark.json"
    path.write_text(content)
    with pytest.raises(AptqError, match=told):
        DecodeTimes.read(path)
    with pytest.raises(AptqError, match="cannot be read"):
        DecodeTimes.read(tmp_path / "nowhere.json")


@pytest.mark.parametrize("change", [{"device": "another"}, {"dtype": "bfloat16"}])
def test_times_that_cannot_be_added_up_are_refused(change: Mapping[str, str]) -> None:
    with pytest.raises(AptqError, match=f"several values of {next(iter(change))}"):
        DecodeTimes(Path("x"), [*ROWS, row(2, 1e-3, **change)])


def test_what_the_table_lacks_is_told() -> None:
    times = DecodeTimes(Path("x"), ROWS)
    for shapes, options in (
        ({"c": (8, 8)}, OPTIONS),
        (SHAPES, [Option(3, 64, "integer")]),
        (SHAPES, [Option(2, 64, "f")]),
    ):
        with pytest.raises(AptqError, match=r"lacks .* benchmark\.model=PATH"):
            times.of(shapes, options)


def test_only_an_allocator_that_counts_time_needs_it() -> None:
    assert Knapsack(count="time").needs_times
    assert not Knapsack().needs_times
