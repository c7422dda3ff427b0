"""Layers that are called with quantized inputs while a model is calibrated and checked."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from aptq.activations.block_scaled import BlockScaled
from aptq.api import Callback, Curvature, Option
from aptq.calibration.activations import quantized_inputs
from aptq.calibration.quantize import Recipe, quantize, stored_logits
from aptq.calibration.walk import Walk
from aptq.formats.integer import Integer
from aptq.hessians.attention import Attention
from aptq.hessians.input import Input
from aptq.models import open_model
from aptq.models.structure import LinearLayer
from aptq.quantizers.factors import Feedback
from aptq.quantizers.gptq import GPTQ
from aptq.settings import ModelSettings
from tests.calibration.memory import Memory

Folder = Callable[..., Path]
INT3 = BlockScaled(bits=3, group_size=16)


@dataclass(frozen=True)
class _Counting(GPTQ):
    """Counts how many curvatures it was given."""

    seen: tuple[list[int], ...] = ([],)

    def prepare(self, curvature: Curvature) -> Feedback:
        self.seen[0].append(1)
        return super().prepare(curvature)


def _walk(folder: Path) -> Walk:
    samples = torch.randint(4, 260, (2, 32), generator=torch.Generator().manual_seed(0))
    return Walk(open_model(ModelSettings(path=str(folder))), samples, 1, Fabric(accelerator="cpu", devices=1))


def _recipe(walk: Walk, activation: BlockScaled | None = INT3, **others: object) -> Recipe:
    plan = dict.fromkeys(walk.source.layer_shapes(), Option(4, 32))
    recipe = Recipe(estimator=Input(), quantizer=GPTQ(), format=Integer(), plan=plan, costs={}, activation=activation)
    return replace(recipe, **others)  # type: ignore[arg-type]


def test_layers_see_quantized_inputs_and_one_tensor_stays_one() -> None:
    first, second, other = (nn.Linear(32, 4) for _ in range(3))
    seen: list[Tensor] = []
    layers = [LinearLayer("first", first), LinearLayer("second", second)]
    x = torch.randn(3, 32)
    with quantized_inputs(layers, INT3):
        for module in (first, second, other):
            handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            module(x)
            handle.remove()
    assert seen[0] is seen[1]
    assert torch.equal(seen[0], INT3.quantize(x))
    assert seen[2] is x
    assert not first._forward_pre_hooks
    with quantized_inputs(layers, None):
        assert not first._forward_pre_hooks


@pytest.mark.parametrize(("family", "true_sequential"), [("llama", True), ("gpt2", False), ("mixtral", True)])
def test_curvatures_are_taken_on_what_the_layers_will_be_called_with(
    family: str, true_sequential: bool, tiny_model_folder: Folder
) -> None:
    traces = []
    for activation in (None, INT3):
        walk, store = _walk(tiny_model_folder(family)), Memory()
        quantize(walk, _recipe(walk, activation, true_sequential=true_sequential), store, Callback())
        traces.append([row.trace for _, rows in store.blocks.values() for row in rows])
    assert all(plain != rounded for plain, rounded in zip(*traces, strict=True) if plain)


def test_layers_that_share_their_input_share_its_curvature(tiny_model_folder: Folder) -> None:
    counts = []
    for activation in (None, INT3):
        walk, quantizer = _walk(tiny_model_folder()), _Counting(seen=([],))
        quantize(walk, _recipe(walk, activation, quantizer=quantizer), Memory(), Callback())
        counts.append(len(quantizer.seen[0]))
    assert counts[0] == counts[1] == 3 * 4  # blocks x (q, k and v; o; gate and up; down)


def test_resuming_gives_the_same_bits_and_logits(tiny_model_folder: Folder) -> None:
    walk, whole = _walk(tiny_model_folder()), Memory()
    recipe = _recipe(walk)
    quantize(walk, recipe, whole, Callback())
    again, resumed = _walk(tiny_model_folder()), Memory()
    resumed.blocks = {0: whole.blocks[0]}
    quantize(again, _recipe(again), resumed, Callback())
    for index, (tensors, _) in whole.blocks.items():
        assert all(torch.equal(tensor, resumed.blocks[index][0][name]) for name, tensor in tensors.items())
    assert torch.equal(stored_logits(walk, recipe, whole), walk.logits())
    plain = stored_logits(_walk(tiny_model_folder()), replace(recipe, activation=None), whole)
    assert not torch.allclose(plain, walk.logits())


def test_behind_full_precision_blocks_inputs_are_as_they_were(tiny_model_folder: Folder) -> None:
    stores = []
    for activation in (None, INT3):
        walk, store = _walk(tiny_model_folder()), Memory()
        quantize(walk, _recipe(walk, activation, prefix="full_precision"), store, Callback())
        stores.append(store)
    for index, (tensors, _) in stores[0].blocks.items():
        assert all(torch.equal(tensor, stores[1].blocks[index][0][name]) for name, tensor in tensors.items())


def test_the_hessian_of_attention_sees_through_quantized_inputs(tiny_model_folder: Folder) -> None:
    walk, store = _walk(tiny_model_folder()), Memory()
    quantize(walk, _recipe(walk, estimator=Attention()), store, Callback())
    assert all(row.trace > 0 and row.relative_error < 0.2 for _, rows in store.blocks.values() for row in rows)
