"""Forward passes that wait for each other at every layer."""

import gc
import weakref
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from aptq.api import AptqError, Block, BlockInputs
from aptq.calibration.lockstep import lockstep
from aptq.calibration.walk import Step, Walk
from aptq.models import open_model
from aptq.models.structure import find_layers, has_experts
from aptq.settings import ModelSettings

WIDTH = 12
DENSE = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi", "opt", "gpt2")


class _Chain(nn.Module):
    """Layers called one after the other, in an order that may depend on the input."""

    def __init__(self, order: Callable[[Tensor], Sequence[int]] = lambda x: range(3)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.order = order

    def forward(self, hidden: Tensor) -> Tensor:
        for index in self.order(hidden):
            hidden = torch.tanh(self.layers[index](hidden))
        return hidden


def _step(module: nn.Module, batches: int = 3) -> Step:
    torch.manual_seed(0)
    block = Block(index=0, name="block", module=module.eval(), layers=find_layers(module, "block"))
    inputs = [BlockInputs(hidden=torch.randn(2, 5, WIDTH), args=(), kwargs={}) for _ in range(batches)]
    return Step(block=block, inputs=inputs)


def _round_as_they_come(step: Step) -> list[tuple[str, list[Tensor]]]:
    """Round each layer to one decimal where all batches wait for it; return the stops."""
    stops = []
    with lockstep(step, step.block.layers) as batches:
        while (name := batches.advance()) is not None:
            stops.append((name, batches.inputs()))
            layer = step.block.layers[name]
            layer.set_weight(layer.weight().round(decimals=1))
    return stops


@pytest.mark.parametrize("family", DENSE)
def test_one_run_is_as_good_as_two(family: str, tiny_model_folder: Callable[..., Path]) -> None:
    """Every layer is met once, with what the rounded layers before it give, and the outputs are the rounded block's."""
    samples = torch.randint(4, 260, (4, 32), generator=torch.Generator().manual_seed(0))
    source = open_model(ModelSettings(path=str(tiny_model_folder(family))))
    for step in Walk(source, samples, 2, Fabric(accelerator="cpu", devices=1)).steps():
        assert not has_experts(step.block.module)
        stops = dict(_round_as_they_come(step))
        assert stops.keys() == step.block.layers.keys()
        expected, seen = _run_and_look(step)
        assert all(torch.equal(a, b) for a, b in zip(step.outputs, expected, strict=True))
        assert all(torch.equal(a, b) for name in stops for a, b in zip(stops[name], seen[name], strict=True))


def _run_and_look(step: Step) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    seen: dict[str, list[Tensor]] = {name: [] for name in step.block.layers}
    handles = [
        layer.module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name, layer in step.block.layers.items()
    ]
    with torch.no_grad():
        outputs = [batch.run(step.block.module) for batch in step.inputs]
    for handle in handles:
        handle.remove()
    return outputs, seen


def test_layers_that_are_not_asked_for_are_passed_by() -> None:
    step = _step(_Chain())
    with lockstep(step, ["block.layers.1"]) as batches:
        assert [batches.advance(), batches.advance()] == ["block.layers.1", None]
    assert len(step.outputs) == 3


def test_a_rank_without_samples_is_through_at_once() -> None:
    step = _step(_Chain(), batches=0)
    with lockstep(step, step.block.layers) as batches:
        assert batches.advance() is None
        assert batches.inputs() == []
    assert step.outputs == []


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(lambda x: (0, 1, 2) if x[0, 0, 0] > 0 else (1, 0, 2), id="an order that depends on the sample"),
        pytest.param(lambda x: (0, 1, 0), id="a layer that is called twice"),
        pytest.param(lambda x: (0, 1, 2) if x[0, 0, 0] > 0 else (0, 1), id="a layer that is called for some"),
    ],
)
def test_what_cannot_go_in_lockstep_is_refused(order: Callable[[Tensor], Sequence[int]]) -> None:
    step = _step(_Chain(order), batches=8)
    with pytest.raises(AptqError, match="true_sequential=false"):
        _round_as_they_come(step)
    assert not any(module._forward_pre_hooks for module in step.block.module.modules())


def test_a_layer_inside_a_context_of_torch_is_refused() -> None:
    class Autocasts(_Chain):
        def forward(self, hidden: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(hidden)

    with pytest.raises(AptqError, match="inside a context"):
        _round_as_they_come(_step(Autocasts()))
    assert not torch.is_autocast_enabled("cpu")


def test_an_error_of_the_block_comes_through() -> None:
    class Fails(_Chain):
        def forward(self, hidden: Tensor) -> Tensor:
            super().forward(hidden)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _round_as_they_come(_step(Fails()))


def test_an_interrupted_step_lets_go_of_its_activations() -> None:
    alive: list[Any] = []

    class Watched(_Chain):
        def forward(self, hidden: Tensor) -> Tensor:
            copy = hidden.clone()
            alive.append(weakref.ref(copy))
            return super().forward(copy)

    step = _step(Watched())
    with lockstep(step, step.block.layers) as batches:
        batches.advance()
        assert all(reference() is not None for reference in alive)
    gc.collect()
    assert len(alive) == 3
    assert not any(reference() is not None for reference in alive)
    assert not any(module._forward_pre_hooks for module in step.block.module.modules())


def test_the_block_can_be_run_on_the_side() -> None:
    step = _step(_Chain())
    with lockstep(step, step.block.layers) as batches:
        batches.advance()
        with torch.no_grad():
            assert step.inputs[0].run(step.block.module).shape == (2, 5, WIDTH)
        assert batches.advance() == "block.layers.1"


def test_two_sets_of_batches_go_through_one_block() -> None:
    """One is a layer ahead: it has passed each layer before that is rounded, and ends as the block was."""
    chain = _Chain()
    step, other = _step(chain), _step(deepcopy(chain))
    beside = Step(block=step.block, inputs=[replace(batch, hidden=2 * batch.hidden) for batch in step.inputs])
    with torch.no_grad():
        expected = [batch.run(step.block.module) for batch in beside.inputs]
    with lockstep(step, step.block.layers) as batches, lockstep(beside, step.block.layers) as ahead:
        place = ahead.advance()
        while (name := batches.advance()) is not None:
            assert name == place
            assert len(ahead.inputs()) == len(batches.inputs()) == 3
            place = ahead.advance()
            step.block.layers[name].set_weight(step.block.layers[name].weight().round(decimals=1))
        assert place is None
    assert all(torch.equal(a, b) for a, b in zip(beside.outputs, expected, strict=True))
    _round_as_they_come(other)
    assert all(torch.equal(a, b) for a, b in zip(step.outputs, other.outputs, strict=True))
