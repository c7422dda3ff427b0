"""The plan file: what is written reads back, and hand-edited mistakes are told."""

import json
from pathlib import Path
from typing import Any

import pytest

from aptq.api import Option
from aptq.errors import AptqError
from aptq.plan import Plan, check_plan, option_labels, read_plan, write_plan

PLAN = Plan(
    layers={
        "model.layers.0.mlp.up_proj": Option(4, 64, "integer"),
        "model.layers.0.mlp.down_proj": Option(3, -1, "float"),
    },
    budget={"name": "ratio", "ratio": 0.5, "code_bits": 3.5, "storage_bits": 3.8},
    predicted_cost=0.25,
    fused_groups=[["model.layers.0.mlp.up_proj"]],
)
SHAPES = {"model.layers.0.mlp.up_proj": (8, 4), "model.layers.0.mlp.down_proj": (4, 8)}


def test_a_plan_reads_back_as_it_was_written(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", PLAN)
    assert read_plan(tmp_path / "plan.json") == PLAN
    assert json.loads((tmp_path / "plan.json").read_text()) == {
        "version": 1,
        "layers": {
            "model.layers.0.mlp.up_proj": {"bits": 4, "format": "integer", "group_size": 64},
            "model.layers.0.mlp.down_proj": {"bits": 3, "format": "float", "group_size": -1},
        },
        "budget": {"name": "ratio", "ratio": 0.5, "code_bits": 3.5, "storage_bits": 3.8},
        "predicted_cost": 0.25,
        "fused_groups": [["model.layers.0.mlp.up_proj"]],
    }


def test_options_are_told_apart_by_what_differs() -> None:
    three, four = Option(3, 64, "integer"), Option(4, 64, "integer")
    assert option_labels([four, three, four]) == {three: "3 bits", four: "4 bits"}
    others = [Option(4, 64, "float"), Option(4, -1, "integer")]
    assert list(option_labels([four, others[0]]).values()) == ["4 bits float", "4 bits integer"]
    assert list(option_labels([four, others[1]]).values()) == ["4 bits, whole rows", "4 bits, groups of 64"]


def test_a_plan_of_layers_alone_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"version": 1, "layers": {"a": {"bits": 2, "format": "integer", "group_size": 32}}}')
    assert read_plan(path) == Plan(layers={"a": Option(2, 32, "integer")})


GOOD = {"bits": 4, "format": "integer", "group_size": 64}


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ([], "holds a list"),
        ({"layers": {"a": GOOD}}, "version None"),
        ({"version": 2, "layers": {"a": GOOD}}, "version 2"),
        ({"version": 1, "layers": {}}, "names no layers"),
        ({"version": 1, "layer": {"a": GOOD}}, "unknown key 'layer'. Did you mean 'layers'"),
        ({"version": 1, "layers": {"a": 4}}, "layer 'a': got 4"),
        ({"version": 1, "layers": {"a": {**GOOD, "bit": 3}}}, "unknown key 'bit'. Did you mean 'bits'"),
        ({"version": 1, "layers": {"a": {"bits": 4}}}, "format, group_size missing"),
        ({"version": 1, "layers": {"a": {**GOOD, "bits": "4"}}}, "bits is '4'"),
        ({"version": 1, "layers": {"a": {**GOOD, "bits": True}}}, "bits is True"),
        ({"version": 1, "layers": {"a": {**GOOD, "group_size": 0}}}, "group_size is 0"),
        ({"version": 1, "layers": {"a": {**GOOD, "format": 3}}}, "format is 3"),
        ({"version": 1, "layers": {"a": GOOD}, "predicted_cost": "low"}, "predicted_cost"),
        ({"version": 1, "layers": {"a": GOOD}, "fused_groups": ["a"]}, "fused_groups"),
    ],
)
def test_mistakes_in_a_plan_are_told(tmp_path: Path, data: Any, told: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(AptqError) as raised:
        read_plan(path)
    assert told in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_missing_or_broken_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(AptqError, match="There is no plan at"):
        read_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text('{"version": 1,\n "layers": {,}}')
    with pytest.raises(AptqError, match=r"no JSON: .* in line 2, column 13"):
        read_plan(tmp_path / "plan.json")


def test_a_plan_that_fits_the_model_passes() -> None:
    check_plan(PLAN, SHAPES)


def test_layers_that_the_model_lacks_are_told_with_the_nearest() -> None:
    with pytest.raises(AptqError, match=r"'?model\.layers\.0\.mlp\.down_proj.*Did you mean 'model\.layers\.0\.mlp\.d"):
        check_plan(PLAN, {"model.layers.0.mlp.up_proj": (8, 4), "model.layers.0.mlp.down": (4, 8)})


def test_layers_that_the_plan_leaves_out_are_told() -> None:
    with pytest.raises(AptqError, match=r"no entry for 7 layer\(s\).* x0, .* and 2 more.*model\.skip"):
        check_plan(PLAN, SHAPES | {f"x{index}": (4, 4) for index in range(7)})


@pytest.mark.parametrize(
    ("group", "told"), [([*SHAPES], "splits a fused group"), (["model.layers.9"], "without an entry")]
)
def test_fused_groups_must_hold_one_option(group: list[str], told: str) -> None:
    plan = Plan(layers=PLAN.layers, fused_groups=[group])
    with pytest.raises(AptqError, match=told):
        check_plan(plan, SHAPES)
