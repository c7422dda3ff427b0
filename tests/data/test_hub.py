import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from aptq.api import AptqError
from aptq.data.hub import check_hub, read_hub


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    rows = [{"text": "one"}, {"text": ""}, {"text": "two"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {"path": "json", "data_files": str(path), "split": "train", "streaming": True}


def test_rows_are_parted_by_blank_lines(options: dict[str, Any]) -> None:
    check_hub(options, "data.hub")
    assert "".join(read_hub(options, "text")) == "one\n\n\n\ntwo"


def test_a_column_that_is_not_there(options: dict[str, Any]) -> None:
    with pytest.raises(AptqError, match="data set json: no field 'body'. Fields there: text"):
        list(read_hub(options, "body"))


def test_without_a_network_the_error_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(**options: Any) -> None:
        raise ConnectionError("Couldn't reach 'allenai/c4' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        AptqError, match=r"'allenai/c4' cannot be loaded: ConnectionError: Couldn't.*data=text data.path="
    ):
        list(read_hub({"path": "allenai/c4", "split": "train"}, "text"))


def test_a_network_that_goes_away_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        yield {"text": "one"}
        raise TimeoutError

    monkeypatch.setattr(datasets, "load_dataset", lambda **options: rows())
    with pytest.raises(AptqError, match="'x' cannot be loaded: TimeoutError: no reason given"):
        list(read_hub({"path": "x", "split": "train"}, "text"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"Say what to load"),
        ("allenai/c4", r"Say what to load"),
        ({"path": "x", "splt": "train"}, r"no option 'splt'. Did you mean 'split'\? Allowed: path, name"),
        ({"path": "x", "split": "train", "trust_remote_code": True}, r"no option 'trust_remote_code'"),
        ({"path": "x"}, r"lacks 'split'"),
        ({"split": "train"}, r"lacks 'path'"),
    ],
)
def test_options_that_load_nothing(given: Any, message: str) -> None:
    with pytest.raises(AptqError, match=message):
        check_hub(given, "data.hub")
