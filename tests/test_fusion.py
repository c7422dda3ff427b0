"""Layers that are run as one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from aptq.fusion import fused_groups
from aptq.models import open_model
from aptq.settings import ModelSettings


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]),
        ("opt", [["k_proj", "v_proj", "q_proj"]]),
        ("gpt2", []),  # it has them as one
    ],
)
def test_of_each_block(family: str, kinds: list[list[str]], tiny_model_folder: Callable[..., Path]) -> None:
    source = open_model(ModelSettings(path=str(tiny_model_folder(family))))
    groups = fused_groups(source.layer_shapes())
    assert len(groups) == len(kinds) * len(source.block_names)
    assert [sorted(name.rpartition(".")[2] for name in group) for group in groups[: len(kinds)]] == [
        sorted(kind) for kind in kinds
    ]
    assert all(len({name.rpartition(".")[0] for name in group}) == 1 for group in groups)


def test_all_experts_of_a_block_are_one(tiny_model_folder: Callable[..., Path]) -> None:
    source = open_model(ModelSettings(path=str(tiny_model_folder("mixtral"))))
    shapes = source.layer_shapes()
    groups = [group for group in fused_groups(shapes) if ".experts." in group[0]]
    assert len(groups) == len(source.block_names)
    assert sum(map(len, groups)) == sum(".experts." in name for name in shapes)


def test_a_layer_by_itself_is_no_group() -> None:
    assert fused_groups(["model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate_proj", "lm_head"]) == []
