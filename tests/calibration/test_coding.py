"""Weights in another basis: the same layer, the same objective, and passes that end on what the layer will do."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from aptq.activations.block_scaled import BlockScaled
from aptq.api import Callback, Curvature, Option
from aptq.calibration.activations import quantized_inputs
from aptq.calibration.coding import Coding, turned
from aptq.calibration.quantize import Recipe, quantize, stored_logits
from aptq.calibration.walk import Walk
from aptq.formats.integer import Integer
from aptq.hessians.attention import Attention
from aptq.hessians.input import Input
from aptq.models import open_model
from aptq.models.structure import LinearLayer
from aptq.quantizers.gptaq import GPTAQ
from aptq.quantizers.gptq import GPTQ
from aptq.settings import ModelSettings
from aptq.transforms.hadamard import Hadamard
from tests.calibration.memory import Memory

Folder = Callable[..., Path]
TURNED = Coding(Integer(), Hadamard())


def _layer() -> LinearLayer:
    return LinearLayer("layer", nn.Linear(96, 24))


def _curvature(heads: int = 1) -> Curvature:
    x = torch.randn(heads, 200, 96)
    y = x + 0.1 * torch.randn(heads, 200, 96)
    return Curvature(column=x.mT @ x / 100, tokens=200, drift=(y - x).mT @ x / 100)


def test_without_a_transform_everything_is_as_it_was() -> None:
    layer, curvature, plain = _layer(), _curvature(), Coding(Integer())
    assert torch.equal(plain.weight(layer), layer.weight())
    assert turned(curvature, None) is curvature


@pytest.mark.parametrize("heads", [1, 3])
def test_the_objective_is_the_same_in_both_bases(heads: int) -> None:
    curvature, difference = _curvature(heads), torch.randn(24, 96)
    found = turned(curvature, Hadamard())
    changed = Hadamard().apply(difference)
    assert found.quadratic(changed) == pytest.approx(curvature.quadratic(difference), rel=1e-4)
    assert found.trace(24) == pytest.approx(curvature.trace(24), rel=1e-4)
    matrix = Hadamard().apply(torch.eye(96))
    assert found.drift is not None
    assert curvature.drift is not None
    torch.testing.assert_close(found.drift, matrix.T @ curvature.drift @ matrix, rtol=1e-4, atol=1e-4)


def test_what_is_stored_stands_for_the_weight_in_the_models_own_basis() -> None:
    layer, option = _layer(), Option(8, 32)
    quantizer = GPTQ()
    factors = quantizer.prepare(turned(_curvature(), TURNED.transform))
    rounded = quantizer.quantize(TURNED.weight(layer), factors, TURNED.format, option).weight
    restored = TURNED.restored(TURNED.format.pack(rounded, option), option, layer.shape)
    assert (restored - layer.weight()).abs().max() < 0.02 * layer.weight().abs().max()


def test_inputs_are_quantized_in_the_transforms_basis() -> None:
    layer, activation, transform = _layer(), BlockScaled(bits=3, group_size=16), Hadamard()
    seen: list[torch.Tensor] = []
    layer.module.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    x = torch.randn(4, 96)
    with quantized_inputs([layer], activation, transform):
        layer.module(x)
    torch.testing.assert_close(transform.apply(seen[0]), activation.quantize(transform.apply(x)))
    with quantized_inputs([layer], activation, transform, as_stored=True):
        layer.module(x)
    assert torch.equal(seen[1], activation.quantize(transform.apply(x)))
    with quantized_inputs([layer], None, transform, as_stored=True):
        layer.module(x)
    assert torch.equal(seen[2], transform.apply(x))
    with quantized_inputs([layer], None, transform):
        layer.module(x)
    assert seen[3] is x


def _walk(folder: Path) -> Walk:
    samples = torch.randint(4, 260, (2, 32), generator=torch.Generator().manual_seed(0))
    return Walk(open_model(ModelSettings(path=str(folder))), samples, 1, Fabric(accelerator="cpu", devices=1))


def _recipe(walk: Walk, **others: object) -> Recipe:
    plan = dict.fromkeys(walk.source.layer_shapes(), Option(8, 32))
    recipe = Recipe(
        estimator=Input(), quantizer=GPTQ(), format=Integer(), plan=plan, costs={}, transform=Hadamard(seed=1)
    )
    return replace(recipe, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "others"),
    [
        ("llama", {}),
        ("llama", {"estimator": Attention()}),
        ("llama", {"quantizer": GPTAQ()}),
        ("llama", {"prefix": "full_precision"}),
        ("gpt2", {"true_sequential": False}),
        ("mixtral", {}),
    ],
)
def test_eight_bits_in_another_basis_keep_the_model(
    family: str, others: dict[str, object], tiny_model_folder: Folder
) -> None:
    walk, store = _walk(tiny_model_folder(family)), Memory()
    expected = _original_logits(tiny_model_folder(family))
    recipe = _recipe(walk, **others)
    quantize(walk, recipe, store, Callback())
    found = stored_logits(_walk(tiny_model_folder(family)), recipe, store)
    assert (found - expected).norm() < 0.1 * expected.norm()
    mistaken = stored_logits(_walk(tiny_model_folder(family)), replace(recipe, transform=None), store)
    assert (mistaken - expected).norm() > 0.5 * expected.norm(), "the stored weights are in another basis"


def _original_logits(folder: Path) -> torch.Tensor:
    walk = _walk(folder)
    for step in walk.steps():
        if not step.last:
            step.run()
    return walk.logits()


def test_layers_that_share_their_input_share_its_factors(tiny_model_folder: Folder) -> None:
    given: list[Curvature] = []

    class Counting(GPTQ):
        def prepare(self, curvature: Curvature):  # type: ignore[no-untyped-def]
            given.append(curvature)
            return super().prepare(curvature)

    for sequential in (True, False):
        given.clear()
        walk = _walk(tiny_model_folder())
        quantize(walk, _recipe(walk, quantizer=Counting(), true_sequential=sequential), Memory(), Callback())
        assert len(given) == 3 * 4  # blocks x (q, k and v; o; gate and up; down)
