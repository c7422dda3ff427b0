"""The report: one page that needs nothing else and tells what the run folder holds."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from aptq.api import Allocation, LayerReport, Option
from aptq.errors import AptqError
from aptq.plan import Plan
from aptq.report import write_report
from aptq.report.content import collect
from aptq.run import Run
from aptq.settings import RunSettings
from aptq.tables import print_measures, print_summary

KINDS = ("self_attn.q_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj")
METRICS: dict[str, Any] = {
    "perplexity": {"c4": 43.21, "wikitext2": None},
    "baseline_perplexity": {"c4": 34.2},
    "accuracy": {"arc": 0.4},
    "bits": {"code": 3.5, "storage": 3.83},
    "bytes": {"model": 103_000_000, "original": 269_000_000},
    "seconds": {"measure": 31.0, "quantize": 95.0},
    "peak_rss_bytes": 1_310_000_000,
    "peak_device_bytes": 2_000_000_000,
    "versions": {"torch": "2.13.0"},
    "backends": [
        {
            "backend": "cpu",
            "layers": 6,
            "options": [
                {"format": "integer", "bits": bits, "group_size": 64, "layers": layers}
                for bits, layers in ((3, 4), (4, 2))
            ],
            "refusals": {},
        },
        {
            "backend": "reference",
            "layers": 1,
            "options": [{"format": "integer", "bits": 8, "group_size": -1, "layers": 1}],
            "refusals": {"triton": ["it runs on <CUDA>"], "cpu": ["no compiler", "groups of 48"]},
        },
    ],
    "samples": [{"prompt": "With <b>", "original": " open", "quantized": " <script>alert(1)</script>"}],
    "audit": {
        "spearman": 0.93,
        "size_spearman": None,
        "slope": 1.1,
        "plans": [
            {"kind": kind, "predicted": predicted, "measured": 1.1 * predicted, "storage_bits": 3.8}
            for kind, predicted in (("chosen", 0.1), ("uniform", 0.2), ("random", 0.3), ("random", 0.4))
        ],
    },
}


def layer(name: str, bits: int, error: float) -> LayerReport:
    return LayerReport(
        name=name, out_features=8, in_features=4, bits=bits, group_size=64, format="integer",
        storage_bits=bits + 0.3, tokens=9,
        trace=0.1, predicted_cost=0.2, error_nearest=2 * error, error=error, relative_error=error, damping=0.01,
        seconds=0.5, events="",
    )  # fmt: skip


def reports() -> list[LayerReport]:
    rows = [
        layer(f"model.layers.{block}.{kind}", 3 + (block + at) % 2, 0.001 * (1 + block + at))
        for block in range(3)
        for at, kind in enumerate(KINDS)
    ]
    rows[4] = replace(rows[4], damping=0.1, events="damping raised to 0.1")
    return [*rows, layer("lm_head", 8, float("nan"))]


def problem(rows: list[LayerReport]) -> Allocation:
    """Three widths for each layer; what they cost falls fourfold a bit, and rises with the layer's number."""
    options = [Option(bits, 64, "integer") for bits in (3, 4, 8)]
    shapes = {row.name: (row.out_features, row.in_features) for row in rows}
    return Allocation(
        shapes=shapes,
        options=options,
        costs={name: {each: (1 + at) * 4.0**-each.bits for each in options} for at, name in enumerate(shapes)},
        storage_bits={name: {each: 32 * each.bits + 16 for each in options} for name in shapes},
    )


def make(folder: Path, metrics: dict[str, Any] | None, rows: list[LayerReport]) -> Path:
    with Run.open(RunSettings(dir=str(folder)), {"name": "demo", "model": {"path": "tiny & small"}}) as run:
        if rows:
            run.write_layers_csv(rows)
            options = {row.name: Option(row.bits, row.group_size, row.format) for row in rows}
            run.save_plan(Plan(layers=options, budget={"ratio": 0.5, "code_bits": 3.5}))
            run.save_sensitivity(problem(rows))
        if metrics is not None:
            run.model_folder.mkdir()
            run.write_metrics(metrics)
            run.finish()
    return folder


class Page(HTMLParser):
    """Collects text, attributes and unclosed tags."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.attributes, self.open = "", [("", "")], list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    page.text = re.sub(r"\s+", " ", page.text)
    assert page.open == []
    return page


def test_the_page_tells_the_results(tmp_path: Path) -> None:
    path = write_report(make(tmp_path / "demo" / "1", METRICS, reports()))
    assert path == tmp_path / "demo" / "1" / "report.html"
    text = read(path).text
    for told in (
        "demo / 1", "tiny & small", "103 MB", "2.61 times smaller", "3.50 bits", "3.83 stored", "34.20", "43.21",
        "+26.3%", "not finite", "accuracy", "0.4000", "2 min 06 s", "1.31 GB", "device 2 GB", "3.500 bits of code",
        "damping raised to 0.1",
        "0.1000 in 1 layer", "lm_head, 8 bits", "without the chosen one: 0.93", "torch 2.13.0", "With <b>",
        "3 bits, groups of 64: 4", "4 bits, groups of 64: 2", "8 bits, whole rows",
        "triton: it runs on <CUDA>", "cpu: no compiler", "cpu: groups of 48",
    ):  # fmt: skip
        assert told in text


def test_scores_of_tasks_have_standard_errors_and_a_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {
        "acc": {"piqa": 0.65, "mean": 0.5}, "acc_stderr": {"piqa": 0.0111, "mean": 0.0122},
        "baseline_acc": {"piqa": 0.7, "mean": 0.52}, "baseline_acc_stderr": {"piqa": 0.0133, "mean": 0.0144},
    }  # fmt: skip
    path = write_report(make(tmp_path, METRICS | scores, reports()))
    text = read(path).text
    told = ("0.7000 ± 0.0133", "0.6500 ± 0.0111", "-0.0500", "0.5200 ± 0.0144", "0.5000 ± 0.0122", "-0.0200")
    for each in (*told, "acc, mean of the tasks"):
        assert each in text
    assert "acc_stderr" not in text
    print_summary(Run.read(tmp_path), path)
    printed = capsys.readouterr().out
    for each in ("acc on piqa", "perplexity on c4", "accuracy on arc", *told):
        assert each in printed
    print_measures({key: scores[key] for key in ("acc", "acc_stderr")}, "mine")
    assert "0.6500 ± 0.0111" in (printed := capsys.readouterr().out)
    assert "acc_stderr" not in printed


def test_the_page_needs_nothing_else_and_runs_nothing(tmp_path: Path) -> None:
    html = write_report(make(tmp_path, METRICS, reports())).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert not re.search(r"https?:|url\(|@import", html)
    sources = [value for name, value in Page(html).attributes if name in ("src", "href")]
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert 'name="viewport"' in html


def test_the_figures_are_png_files(tmp_path: Path) -> None:
    write_report(make(tmp_path, METRICS, reports()))
    for name in ("audit.png", "bits.png", "errors.png", "stages.png", "trade_off.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    head, *rows = (tmp_path / "trade_off.csv").read_text().splitlines()
    assert head == "stored_bits,predicted_cost"
    points = [tuple(map(float, row.split(","))) for row in rows]
    assert points == sorted(points), "larger plans"
    assert [cost for _, cost in points] == sorted((cost for _, cost in points), reverse=True), "cost less"


@pytest.mark.parametrize("rows", [[], reports()])
@pytest.mark.parametrize(
    "metrics", [None, {key: METRICS[key] for key in METRICS if key not in ("samples", "audit", "accuracy", "backends")}]
)
def test_what_is_missing_is_left_out(tmp_path: Path, rows: list[LayerReport], metrics: dict[str, Any] | None) -> None:
    if metrics is not None:
        metrics = metrics | {"perplexity": {}, "baseline_perplexity": {}, "seconds": {}, "peak_device_bytes": None}
    text = read(write_report(make(tmp_path, metrics, rows))).text
    assert ("not finished" in text) == (metrics is None)
    assert ("Nothing was evaluated" in text) == (metrics is not None)
    assert ("bits per layer" in text) == bool(rows)
    assert (tmp_path / "bits.png").exists() == bool(rows)
    assert ("What the bits buy" in text) == bool(rows)
    assert "Audit" not in text
    assert "Backends" not in text


def test_a_plan_alone_gives_the_map_of_bits(tmp_path: Path) -> None:
    make(tmp_path, None, reports())
    (tmp_path / "layers.csv").unlink()
    text = read(write_report(tmp_path)).text
    assert "bits per layer" in text
    assert "Relative error" not in text


def test_layers_are_laid_out_by_kind_and_depth(tmp_path: Path) -> None:
    content = collect(Run.read(make(tmp_path, METRICS, reports())))
    assert content.bits is not None
    assert content.bits.kinds == ["self_attn.q_proj", "mlp.experts.*.up_proj"]
    assert content.bits.depths == [0, 1, 2]
    assert content.bits.values == [[3, 4, 3], [3.5, 3.5, 3.5]]  # experts by their mean
    assert content.errors is not None
    assert [cell.level for cell in content.errors.cells[0] if cell] == pytest.approx([0, 0.461, 0.730], abs=1e-3)
    widths = [("3 bits", 5), ("4 bits", 4), ("8 bits", 1)]
    assert [(width.label, width.layers) for width in content.widths] == widths
    assert sum(width.share or 0 for width in content.widths) == pytest.approx(1)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AptqError, match="no run folder"):
        write_report(tmp_path)


def test_a_damaged_table_is_told(tmp_path: Path) -> None:
    make(tmp_path, None, reports())
    (tmp_path / "layers.csv").write_text("name,bits\na,four\n")
    with pytest.raises(AptqError, match=r"layers\.csv is damaged"):
        write_report(tmp_path)
