"""Runs side by side."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from aptq.comparison import write_comparison
from aptq.comparison.content import collect
from aptq.comparison.figure import _panels
from aptq.errors import AptqError
from aptq.run import Run
from aptq.settings import RunSettings


def make(
    folder: Path,
    budget: float,
    metric: str,
    perplexity: float,
    options: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> Path:
    config = {
        "name": folder.name,
        "model": {"path": "tiny"},
        "metric": {"name": metric, **options},
        "allocator": {"name": "knapsack", "budget": budget},
        "cache_dir": str(folder),
    }
    metrics = {
        "perplexity": {"c4": perplexity, "wikitext2": None},
        "baseline_perplexity": {"c4": 30.0},
        "bits": {"code": budget, "storage": budget + 0.3},
        "bytes": {"model": 100_000_000, "original": 500_000_000},
        "seconds": {"quantize": 60.0, "evaluate": 30.0},
        "peak_rss_bytes": 10**9,
        "peak_device_bytes": None,
        "versions": {},
        **more,
    }
    with Run.open(RunSettings(dir=str(folder)), config) as run:
        run.model_folder.mkdir()
        run.write_metrics(metrics)
        run.finish()
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    audit = {"spearman": 0.93, "slope": 1.0, "plans": []}
    return [
        make(tmp_path / "a", 3.5, "output", 40.0),
        make(tmp_path / "b", 3.0, "output", 45.0, audit=audit),
        make(tmp_path / "c", 3.0, "error", 50.0),
    ]


def test_only_what_differs_is_listed_and_budgets_make_a_curve(folders: list[Path]) -> None:
    content = collect([Run.read(folder) for folder in folders])
    assert content.keys == ["allocator.budget", "metric.name"]
    assert [(row.name, row.curve) for row in content.rows] == [
        ("c", "metric=error"),
        ("b", "metric=output"),
        ("a", "metric=output"),
    ]
    assert content.best("c4") == 40.0
    assert content.best("wikitext2") is None
    assert content.baseline == {"c4": 30.0}
    assert content.common == {
        "hessian": "None", "allocator": "knapsack", "format": "None", "quantizer": "None"
    }  # fmt: skip


def test_options_that_only_one_component_has_are_listed_but_make_no_longer_labels(tmp_path: Path) -> None:
    def labels(*samples: int) -> list[str]:
        runs = [
            make(tmp_path / f"{samples}{number}", 3.0 + number / 4, "output", 40.0, options={"samples": each})
            for number, each in enumerate(samples)
        ]
        runs.append(make(tmp_path / f"{samples}error", 3.0, "error", 50.0))
        content = collect([Run.read(folder) for folder in runs])
        assert sorted(content.keys) == ["allocator.budget", "metric.name", "metric.samples"]
        return sorted({row.curve for row in content.rows})

    assert labels(8, 8) == ["metric=error", "metric=output"]
    assert labels(8, 4) == [
        "metric=error, metric.samples=–", "metric=output, metric.samples=4", "metric=output, metric.samples=8"
    ]  # fmt: skip


def test_the_page_stands_alone_and_tells_the_figures(folders: list[Path], tmp_path: Path) -> None:
    page = write_comparison(folders, tmp_path / "out")
    html = page.read_text(encoding="utf-8")
    assert page == tmp_path / "out" / "comparison.html"
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert not re.search(r"<script|https?:|url\(|@import", html)
    for told in ("3 runs side by side", "allocator.budget", "<b>40.00</b>", "0.93", "1 min 30 s", "full precision"):
        assert told in html


def test_runs_of_different_models_have_no_common_baseline(folders: list[Path], tmp_path: Path) -> None:
    other = make(tmp_path / "d", 3.0, "output", 12.0)
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("tiny", "large"))
    assert collect([Run.read(folders[0]), Run.read(other)]).baseline == {}


def test_scores_have_a_table_of_their_own_and_a_panel_of_their_mean(folders: list[Path], tmp_path: Path) -> None:
    def scores(*values: float) -> dict[str, dict[str, float]]:
        names = ("piqa", "arc_easy", "mean")
        return {"acc": dict(zip(names, values, strict=True)), "acc_stderr": dict.fromkeys(names, 0.0125)}

    before = {f"baseline_{measure}": values for measure, values in scores(0.71, 0.51, 0.61).items()}
    judged = make(tmp_path / "e" / "a", 3.2, "output", 42.0, **scores(0.7, 0.5, 0.6), **before)
    content = collect([Run.read(each) for each in (*folders, judged)])
    assert content.judged == {"acc": ["piqa", "arc_easy", "mean"]}
    assert content.baseline_scores["acc"]["mean"] == (0.61, 0.0125)
    assert sorted((row.name, "acc" in row.scores) for row in content.rows) == [
        ("a", False), ("a", True), ("b", False), ("c", False)
    ]  # fmt: skip
    panels = _panels(content)
    assert [(each.measure, each.title) for each in panels] == [("perplexity", "c4"), ("acc", "mean of the tasks")]
    assert list(panels[1].figures.values()) == [(0.6, 0.0125)]
    assert panels[1].full == 0.61
    html = write_comparison([*folders, judged], tmp_path / "out").read_text(encoding="utf-8")
    for told in ("<h2>acc</h2>", "arc_easy", "0.7000 ± 0.0125", "0.6100 ± 0.0125"):
        assert told in html
    assert (
        "<h2>" not in write_comparison(folders, tmp_path / "none").read_text(encoding="utf-8").split("Figures</h2>")[1]
    )


def test_one_run_and_unfinished_ones_are_refused(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(AptqError, match="two runs at least"):
        write_comparison(folders[:1], tmp_path)
    (folders[1] / "metrics.json").unlink()
    with pytest.raises(AptqError, match="not finished"):
        write_comparison(folders, tmp_path)
