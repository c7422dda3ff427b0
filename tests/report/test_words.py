"""Figures are spelled for readers."""

import pytest

from aptq.report import words


@pytest.mark.parametrize(
    ("count", "spelled"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (70_300_000, "70.3 MB"), (2e12, "2 TB")]
)
def test_sizes(count: float, spelled: str) -> None:
    assert words.size(count) == spelled


@pytest.mark.parametrize(
    ("seconds", "spelled"), [(0.44, "0.4 s"), (12.4, "12 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds: float, spelled: str) -> None:
    assert words.duration(seconds) == spelled


@pytest.mark.parametrize(
    ("value", "spelled"),
    [(None, "not finite"), (float("inf"), "not finite"), (0.0, "0.0000"), (1234.5, "1,234.50"), (2.5e-7, "2.50e-07")],
)
def test_figures(value: float | None, spelled: str) -> None:
    assert words.figure(value) == spelled


@pytest.mark.parametrize(
    ("before", "after", "spelled"), [(40, 50, "+25.0%"), (50, 40, "-20.0%"), (0, 3, ""), (None, 3, ""), (3, None, "")]
)
def test_changes(before: float | None, after: float | None, spelled: str) -> None:
    assert words.change(before, after) == spelled


def test_scores_have_their_standard_error_and_change_by_a_difference() -> None:
    assert words.measured(0.51234, 0.0123) == "0.5123 ± 0.0123"
    assert words.measured(0.51234, None) == "0.5123"
    assert words.measured(None, None) == "not finite"
    assert words.difference(0.5, 0.4) == "-0.1000"
    assert words.difference(None, 0.4) == ""


def test_shares() -> None:
    assert words.share(0.254) == "25%"


def test_where_a_plan_came_from() -> None:
    allocator = {"name": "knapsack", "bits": [2, 3], "budget": 2.5, "pin": {"*.o_proj": 3}, "group_sizes": []}
    averages = {"code_bits": 2.5, "storage_bits": 2.789}
    assert words.origin({"allocator": allocator, **averages}) == (
        "Chosen by knapsack: bits 2/3, budget 2.5, pin *.o_proj=3. "
        "On average 2.500 bits of code and 2.789 stored bits a weight."
    )
    assert (
        words.origin({"plan": "a.json", "code_bits": 3.0}) == "Given: a.json. On average 3.000 bits of code a weight."
    )
    assert words.origin({"code_bits": 3.0, "embedding": {"bits": 8, "group_size": 64}}) == (
        "On average 3.000 bits of code a weight. The embedding, beside them, has 8 bits of code a weight."
    )
    assert words.origin({}) == ""
