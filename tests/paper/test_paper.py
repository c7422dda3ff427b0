"""The paper's tables and figure beside ours."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from aptq.errors import AptqError
from aptq.paper import write_paper
from aptq.paper.published import FIGURE_2, REMARKS, TABLE_1, TABLE_3
from aptq.run import Run
from aptq.settings import RunSettings

CONFIG: dict[str, Any] = {
    "model": {"path": "models/tiny & small"},
    "data": {"source": "text", "path": "c4.jsonl", "num_samples": 16, "sequence_length": 512},
    "evaluator": {"name": "perplexity", "num_sequences": 64, "sequence_length": 512},
    "format": {"name": "integer", "group_size": 128},
}


def _row(folder: Path, name: str, c4: float | None, bits: float = 3.5, baseline: bool = False) -> Path:
    metrics = {
        "perplexity": {"c4": c4, "wikitext2": 50.0},
        "baseline_perplexity": {"c4": 32.0, "wikitext2": 40.0} if baseline else {},
        "bits": {"code": bits, "storage": bits + 0.15625},
        "bytes": {"model": 1, "original": 2},
        "seconds": {},
        "peak_rss_bytes": 1,
        "peak_device_bytes": None,
        "versions": {},
    }
    with Run.open(RunSettings(dir=str(folder / name)), CONFIG) as run:
        run.model_folder.mkdir()
        run.write_metrics(metrics)
        run.finish()
    return folder / name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = {
        "rtn_4": _row(tmp_path, "rtn_4", 48.0, bits=4.0, baseline=True),
        "gptq_4": _row(tmp_path, "gptq_4", 36.0, bits=4.0),
        "aptq_75": _row(tmp_path, "aptq_75", 40.0, bits=3.4375),
        "aptq_50": _row(tmp_path, "aptq_50", None, bits=3.0),
        "manual_blockwise_75_first": _row(tmp_path, "manual_blockwise_75_first", 44.0, bits=3.375),
    }
    assert write_paper(tmp_path, rows) == tmp_path / "report.html"
    return tmp_path


def _lines(folder: Path) -> list[list[str]]:
    text = (folder / "tables.md").read_text()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_printed_figures_and_ours_stand_side_by_side(folder: Path) -> None:
    lines = _lines(folder)
    assert [
        "APTQ-75%",
        "3.5",
        "5.54 (+6.1%)",
        "6.54 (+15.1%)",
        "3.44",
        "3.59",
        "40.00 (+25.0%)",
        "50.00 (+25.0%)",
    ] in lines
    assert ["FP16, the original", "16", "5.22", "5.68", "–", "–", "32.00", "40.00"] in lines
    assert ["OWQ", "4.01", "5.56 (+6.5%)", "7.15 (+25.9%)", "–", "–", "–", "–"] in lines
    assert ["APTQ-50%", "3.0", "6.24 (+19.5%)", "–", "3.00", "3.16", "not finite", "50.00 (+25.0%)"] in lines
    assert ["rtn_4", "–", "–", "–", "4.00", "4.16", "48.00 (+50.0%)", "50.00 (+25.0%)"] in lines
    first = "Manual block-wise 75%, first blocks"
    assert [first, "3.5", "5.84 (+11.9%)", "–", "3.38", "3.53", "44.00 (+37.5%)", "50.00 (+25.0%)"] in lines
    assert len({len(line) for line in lines}) == 2, "settings and results"


def test_ways_to_choose_are_set_side_by_side_at_every_share(tmp_path: Path) -> None:
    figures = {
        "aptq_75": 40.0,
        "aptq_50": None,
        "aptq_loss_50": 60.0,
        "aptq_loss_75": 39.0,
        "manual_blockwise_75_first": 44.0,
        "manual_blockwise_50_first": 61.0,
        "aptq_loss_60_odd": 7.0,
        "gptq_4": 37.0,
    }
    write_paper(tmp_path, {name: _row(tmp_path, name, c4) for name, c4 in figures.items()})
    lines = _lines(tmp_path)
    at = lines.index(["", "APTQ", "APTQ loss", "manual blockwise, first"])
    assert lines[at + 2 : at + 4] == [
        ["75 %", "40.00 / 50.00", "**39.00 / 50.00**", "44.00 / 50.00"],
        ["50 %", "not finite / 50.00", "**60.00 / 50.00**", "61.00 / 50.00"],
    ]
    assert any(line[0] == "aptq_loss_60_odd" for line in lines), "a way with one share is a row as others are"
    page = _Page((tmp_path / "report.html").read_text())
    assert ["75 %", "40.00 / 50.00", "39.00 / 50.00", "44.00 / 50.00"] in page.rows


def test_settings_and_remarks_are_told(folder: Path) -> None:
    text = (folder / "tables.md").read_text()
    assert "16 samples of 512 tokens, c4.jsonl" in text
    assert "up to 64 windows of 512 tokens" in text
    for remark in REMARKS:
        assert remark in text
    assert "7.08" in text
    assert all(each.label in text for each in (*TABLE_1, *TABLE_3, *FIGURE_2))


class _Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_the_page_says_the_same_and_needs_nothing_else(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    page = _Page(html)
    assert "tiny & small" in page.text
    assert [line for line in _lines(folder) if line[0] == "APTQ-75%"][0] in page.rows
    for remark in REMARKS:
        assert remark in page.text
    assert re.findall(r'(?:src|href)="(?!data:)([^"]+)"', html) == [
        f"{name}/report.html" for name in ("rtn_4", "gptq_4", "aptq_75", "aptq_50", "manual_blockwise_75_first")
    ]
    assert "http" not in html.replace("https://arxiv", "")


def test_the_figure_is_a_png_file_and_on_the_page(folder: Path) -> None:
    assert (folder / "figure2.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64,iVBOR" in (folder / "report.html").read_text()


@pytest.mark.parametrize("c4", [40.0, None])
def test_one_row_alone_will_do(c4: float | None, tmp_path: Path) -> None:
    write_paper(tmp_path, {"aptq_75": _row(tmp_path, "aptq_75", c4)})
    told = "40.00" if c4 else "not finite"
    assert ["APTQ-75%", "3.5", "5.54 (+6.1%)", "–", "3.50", "3.66", told, "50.00"] in _lines(tmp_path)


def test_a_row_without_an_end_is_refused(tmp_path: Path) -> None:
    path = _row(tmp_path, "aptq_75", 40.0)
    (path / "metrics.json").unlink()
    with pytest.raises(AptqError, match="not finished"):
        write_paper(tmp_path, {"aptq_75": path})


def test_what_is_printed_agrees_with_itself() -> None:
    """Results that the paper shows more than once, and the averages of its bits."""
    by_row: dict[str, set[tuple[float, float]]] = {}
    for each in (*TABLE_1, *TABLE_3, *FIGURE_2):
        if each.row is not None:
            by_row.setdefault(each.row, set()).add((each.bits, each.c4))
    assert all(len(figures) == 1 for figures in by_row.values())
