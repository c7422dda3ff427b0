"""Blocks and layers are found by the modules of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from aptq.api import AptqError
from aptq.models import Conv1DLayer, LinearLayer, find_blocks, find_layers, open_model
from aptq.settings import ModelSettings

_LLAMA = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}


def _attention(**changes: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return {f"self_attn.{name}": shape for name, shape in (_LLAMA | changes).items()}


def _gated(width: int, name: str = "mlp") -> dict[str, tuple[int, int]]:
    return {f"{name}.gate_proj": (width, 64), f"{name}.up_proj": (width, 64), f"{name}.down_proj": (64, width)}


def _experts() -> dict[str, tuple[int, int]]:
    shapes = {"gate_up_proj": (96, 64), "down_proj": (64, 48)}
    return {f"mlp.experts.{i}.{name}": shape for i in range(4) for name, shape in shapes.items()}


EXPECTED = {
    "llama": ("model.layers", _attention() | _gated(96)),
    "llama_untied": ("model.layers", _attention() | _gated(96)),
    "qwen2": ("model.layers", _attention() | _gated(80)),
    "qwen3": (
        "model.layers",
        _attention(q_proj=(128, 64), k_proj=(64, 64), v_proj=(64, 64), o_proj=(64, 128)) | _gated(96),
    ),
    "mistral": ("model.layers", _attention() | _gated(96)),
    "gemma2": ("model.layers", _attention() | _gated(96)),
    "phi": (
        "model.layers",
        {f"self_attn.{name}": (64, 64) for name in ("q_proj", "k_proj", "v_proj", "dense")}
        | {"mlp.fc1": (96, 64), "mlp.fc2": (64, 96)},
    ),
    "opt": (
        "model.decoder.layers",
        {f"self_attn.{name}": (64, 64) for name in ("k_proj", "v_proj", "q_proj", "out_proj")}
        | {"fc1": (96, 64), "fc2": (64, 96)},
    ),
    "gpt2": (
        "transformer.h",
        {"attn.c_attn": (192, 64), "attn.c_proj": (64, 64), "mlp.c_fc": (96, 64), "mlp.c_proj": (64, 96)},
    ),
    "mixtral": ("model.layers", _attention() | _experts()),
    "qwen3_moe": ("model.layers", _attention() | _experts()),
    "qwen2_moe": ("model.layers", _attention() | _experts() | _gated(80, "mlp.shared_expert")),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_layers_of_every_family(family: str, tiny_model_folder: Callable[..., Path]) -> None:
    source = open_model(ModelSettings(path=str(tiny_model_folder(family))))
    stack, layers = EXPECTED[family]
    assert source.block_names == tuple(f"{stack}.{index}" for index in range(3))
    expected = {f"{block}.{name}": shape for block in source.block_names for name, shape in layers.items()}
    assert source.layer_shapes() == expected
    assert list(source.layer_shapes()) == list(expected)


def _block(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


def test_blocks_are_the_largest_outermost_stack() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapters = nn.ModuleList([nn.Linear(4, 4) for _ in range(9)])
            self.body = nn.Module()
            self.body.layers = nn.ModuleList(
                [_block(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])) for _ in range(2)]
            )

    assert list(find_blocks(Model())) == ["body.layers.0", "body.layers.1"]


@pytest.mark.parametrize(
    "modules",
    [[nn.LayerNorm(4), nn.LayerNorm(4)], [nn.Linear(4, 4), nn.LayerNorm(4)], []],
    ids=["no linear layers", "mixed classes", "empty"],
)
def test_model_without_blocks_is_refused(modules: list[nn.Module]) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(modules)
    with pytest.raises(AptqError, match="no linear layers found"):
        find_blocks(model)


def test_routers_and_single_outputs_are_no_layers() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 4)
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
            self.shared_expert_gate = nn.Linear(8, 1)

    class Attention(nn.Module):  # an output width that equals the number of experts does not make a router
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)
            self.k = nn.Linear(8, 4)

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()
            self.router = _block(nn.LayerNorm(8), nn.Linear(8, 4))
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    mixture = find_layers(_block(Attention(), Mixture()), "b")
    assert list(mixture) == ["b.0.q", "b.0.k", *(f"b.1.experts.{i}" for i in range(4))]
    direct = find_layers(Direct(), "b")
    assert list(direct) == ["b.attention.q", "b.attention.k", *(f"b.experts.{i}" for i in range(4))]


@pytest.mark.parametrize(("module", "kind"), [(nn.Linear(3, 5), LinearLayer), (Conv1D(5, 3), Conv1DLayer)])
def test_layer_reads_and_writes_out_by_in(module: nn.Module, kind: type[LinearLayer]) -> None:
    layer = kind("x", module)
    assert layer.shape == (5, 3)
    weight = torch.arange(15.0, dtype=torch.float64).reshape(5, 3)
    layer.set_weight(weight)
    assert torch.equal(layer.weight(), weight.float())
    assert layer.weight().data_ptr() == module.weight.data_ptr()
    inputs = torch.eye(3)
    torch.testing.assert_close(module(inputs) - module.bias, weight.float().T)
    with pytest.raises(ValueError, match=r"shape \(1, 3\), expected \(5, 3\)"):
        layer.set_weight(weight[:1])


def test_writing_to_a_block_that_is_not_loaded_is_a_mistake() -> None:
    layer = LinearLayer("x", nn.Linear(3, 5, device="meta"))
    with pytest.raises(RuntimeError, match="not loaded"):
        layer.set_weight(torch.zeros(5, 3))


def test_skip_drops_layers(tiny_model_folder: Callable[..., Path]) -> None:
    path = str(tiny_model_folder("llama"))
    source = open_model(ModelSettings(path=path, skip=["*.down_proj", "model.layers.0.*", "lm_head"]))
    names = set(source.layer_shapes())
    assert not any(name.endswith("down_proj") or name.startswith("model.layers.0.") for name in names)
    assert len(names) == 2 * 6
    assert set(source.load_block(1, "cpu").layers) == {name for name in names if name.startswith("model.layers.1.")}
    others = dict(source.other_tensors())
    assert "model.layers.0.self_attn.q_proj.weight" in others


def test_skip_that_matches_nothing_names_what_is_near(tiny_model_folder: Callable[..., Path]) -> None:
    path = str(tiny_model_folder("llama"))
    with pytest.raises(AptqError, match=r"'model.layers.0.self_attn.qproj' matches no linear.*self_attn.q_proj"):
        open_model(ModelSettings(path=path, skip=["model.layers.0.self_attn.qproj"]))
    with pytest.raises(AptqError, match="leaves no layer"):
        open_model(ModelSettings(path=path, skip=["*"]))
