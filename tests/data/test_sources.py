import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from aptq.api import AptqError
from aptq.data import check_data
from aptq.data.sources import evaluation_texts_by_name
from aptq.settings import DataSettings

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("train.txt", "test.txt", "c4/test.jsonl", "wiki/test.txt", "wiki/test.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("some text" if path.suffix == ".txt" else '{"text": "some text"}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(evaluation_path: Any) -> list[str]:
    return list(evaluation_texts_by_name(DataSettings(source="text", evaluation_path=evaluation_path)))


def test_data_that_can_be_used(folder: Path) -> None:
    check_data(DataSettings(source="pydoc"), evaluate=True)
    check_data(DataSettings(source="text", path="train.txt"), evaluate=False)
    check_data(DataSettings(source="text", path="*.txt", evaluation_path={"a": "c4/test.jsonl"}), evaluate=True)
    check_data(DataSettings(source="hub", hub={"path": "x", "split": "train"}), evaluate=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "pidoc"}, r"data.source='pidoc' is unknown. Did you mean 'pydoc'\? Allowed: pydoc, text, hub"),
        ({"source": "pydoc", "num_samples": 0}, r"data.num_samples=0 is not positive"),
        ({"source": "pydoc", "sequence_length": -1}, r"data.sequence_length=-1 is not positive"),
        ({"source": "pydoc", "batch_size": 0}, r"data.batch_size=0 is not positive"),
        ({"source": "pydoc", "path": "train.txt"}, r"data.source=pydoc does not read it. Choose data=text"),
        ({"source": "text", "path": "train.txt", "hub": {"path": "x"}}, r"data.hub is set.* Choose data=hub"),
        ({"source": "text"}, r"data.path is not set"),
        (
            {"source": "text", "path": "tarin.txt"},
            r"data.path=tarin.txt: there is no such file. Did you mean .*train.txt",
        ),
        ({"source": "text", "path": "train.txt"}, r"data.evaluation_path is not set"),
        (
            {"source": "text", "path": "train.txt", "evaluation_path": {}},
            r"data.evaluation_path is not set|empty mapping",
        ),
        ({"source": "text", "path": "train.txt", "evaluation_path": {"a": "no.txt"}}, r"data.evaluation_path.a=no.txt"),
        (
            {"source": "text", "path": "train.txt", "evaluation_path": "c4/test.jsonl", "text_field": "b"},
            r"no field 'b'",
        ),
        ({"source": "hub"}, r"data.hub is \{\}. Say what to load"),
        ({"source": "hub", "hub": {"path": "x", "split": "train"}}, r"data.evaluation_hub is empty"),
        (
            {"source": "hub", "hub": {"path": "x", "split": "train"}, "evaluation_hub": {"a": {"path": "x"}}},
            r"data.evaluation_hub.a lacks 'split'",
        ),
    ],
)
def test_data_that_cannot_be_used(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AptqError, match=message):
        check_data(DataSettings(**options), evaluate=True)


def test_calibrating_on_the_evaluation_text_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_data(DataSettings(source="text", path="*.txt", evaluation_path="./test.txt"), evaluate=True)
    assert "test.txt is calibrated on and evaluated on" in caplog.text


def test_names_of_evaluation_texts(folder: Path) -> None:
    assert names("train.txt") == ["train"]
    assert names({"mine": "train.txt", "both": ["train.txt", "test.txt"]}) == ["mine", "both"]
    assert names(["train.txt", "c4/test.jsonl", "wiki/test.txt"]) == ["train", "c4_test", "wiki_test"]
    assert len(set(names(["wiki/test.txt", "wiki/test.json", "c4/test.jsonl"]))) == 3


def test_files_under_one_name_are_one_text(folder: Path) -> None:
    texts = evaluation_texts_by_name(DataSettings(source="text", evaluation_path={"both": ["train.txt", "c4/*"]}))
    assert "".join(texts["both"]) == "some text\n\nsome text"


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_name_every_setting_and_pass_the_check(path: Path) -> None:
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(options) == {field.name for field in dataclasses.fields(DataSettings)}
    if options["source"] == "text":
        with pytest.raises(AptqError, match="data.path is not set"):
            check_data(DataSettings(**options), evaluate=True)
    else:
        check_data(DataSettings(**options), evaluate=True)
