"""Student layers: the stored layer at first, the original where they teach, trained through the rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import aptq
from aptq import registry
from aptq.api import AptqError, Option, RoundableFormat
from aptq.finished import job_of
from aptq.registry import build
from aptq.run import Run
from aptq_bitdistiller.student import StudentLinear, enroll, teaching

INTEGER = {"name": "integer", "group_size": 16}
FORMATS = [
    (INTEGER, 2),
    ({"name": "asymmetric_float", "group_size": 16}, 3),
    ({"name": "scaled", "inner": INTEGER}, 3),
    ({"name": "float", "code": "fp", "group_size": 16, "scale_dtype": "e4m3"}, 4),
]
"""Of one scale, of two, of factors for channels, of scales in units."""


def _layer(config: dict[str, object], bits: int) -> tuple[StudentLinear, torch.Tensor, torch.Tensor]:
    """Return a layer, the original weight, and stored values that are not the original's nearest."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 40, generator=generator)
    format, option = build("format", config), Option(bits, 16)
    assert isinstance(format, RoundableFormat)
    grid = format.fit(weight[None], option, torch.ones(1, 40))
    moved = weight + 0.3 * torch.randn(12, 40, generator=generator)
    quantized = grid.finish(grid.round(moved.T[None].contiguous(), slice(None))[0])
    layer = StudentLinear(weight, nn.Parameter(torch.ones(12)), format.pack(quantized, option), format, option)
    return layer, weight, format.dequantize(quantized, option)


@pytest.mark.parametrize(("config", "bits"), FORMATS)
def test_begins_as_the_stored_layer_and_keeps_what_of_the_original_rounds_to_it(
    config: dict[str, object], bits: int
) -> None:
    layer, weight, stored = _layer(config, bits)
    x = torch.randn(3, 40)
    assert torch.equal(layer(x), functional.linear(x, stored, torch.ones(12)))
    assert torch.equal(layer.format.dequantize(layer.quantized(), layer.option), stored)
    kept = (layer.master == weight).float().mean()
    assert 0.2 < kept < 1
    assert bool(((layer.master == weight) | (layer.master == stored)).all())
    with teaching({"layer": layer}):
        assert torch.equal(layer(x), functional.linear(x, weight, torch.ones(12)))
    assert torch.equal(layer(x), functional.linear(x, stored, torch.ones(12)))


@pytest.mark.parametrize(("config", "bits"), FORMATS)
def test_gradients_pass_the_rounding_and_what_is_packed_is_what_multiplied(
    config: dict[str, object], bits: int
) -> None:
    layer, _, stored = _layer(config, bits)
    x, target = torch.randn(64, 40), torch.randn(64, 12)
    (gradient,) = torch.autograd.grad((layer(x) * target).sum(), layer.master)
    assert torch.allclose(gradient, target.T @ x, atol=1e-5)
    with torch.no_grad():
        layer.master.add_(0.2 * torch.randn(12, 40))
    packed = layer.packed()
    values = layer.format.dequantize(layer.format.unpack(packed, layer.option, (12, 40)), layer.option)
    assert not torch.equal(values, stored)
    assert torch.equal(layer(x), functional.linear(x, values, torch.ones(12)))


def test_inputs_of_the_student_alone_are_quantized() -> None:
    layer, weight, stored = _layer(INTEGER, 2)
    activation = build("activation", {"name": "block_scaled"})
    layer.activation = activation
    x = torch.randn(3, 40)
    assert torch.equal(layer(x), functional.linear(activation.quantize(x), stored, torch.ones(12)))
    with teaching({"layer": layer}):
        assert torch.equal(layer(x), functional.linear(x, weight, torch.ones(12)))


def test_the_student_multiplies_in_the_basis_that_the_layer_is_stored_in() -> None:
    transform, weight = build("transform", {"name": "hadamard"}), torch.randn(12, 40)
    format, option = build("format", INTEGER), Option(4, 16)
    grid = format.fit(transform.apply(weight)[None], option)
    quantized = grid.finish(grid.round(transform.apply(weight).T[None].contiguous(), slice(None))[0])
    packed = format.pack(quantized, option)
    layer = StudentLinear(weight, None, packed, format, option, transform=transform)
    assert torch.equal(layer.master, transform.apply(weight)), "its own nearest"
    x = torch.randn(3, 40)
    stored = format.dequantize(quantized, option)
    assert torch.equal(layer(x), functional.linear(transform.apply(x), stored))
    assert (layer(x) - functional.linear(x, weight)).norm() < 0.1 * functional.linear(x, weight).norm()
    with teaching({"layer": layer}):
        assert torch.equal(layer(x), functional.linear(x, weight))


@pytest.mark.parametrize("overrides", [(), ("transform=none",)])
def test_a_model_is_teacher_and_student_and_shares_the_rest(
    overrides: tuple[str, ...], make_run: Callable[..., Path], model_folder: Path
) -> None:
    folder = make_run(*overrides)
    original = AutoModelForCausalLM.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    weights = {
        name: module.weight.data_ptr() for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    job = job_of(Run.read(folder))
    basis = registry.build("transform", job.transform_config) if job.transform_config else None
    assert (basis is None) == bool(overrides), "rotated by default"
    students = enroll(model, job, transform=basis)
    assert {name: layer.weight.data_ptr() for name, layer in students.items()}.items() <= weights.items()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"{name}.master" for name in students]
    tokens = torch.arange(40)[None] * 5
    with torch.no_grad():
        quantized = aptq.load(folder / "model", backend="reference")
        assert torch.allclose(model(tokens).logits, quantized(tokens).logits, atol=1e-4)
        with teaching(students):
            assert torch.equal(model(tokens).logits, original(tokens).logits)


def test_a_format_without_a_grid_to_train_on_is_refused(make_run: Callable[..., Path]) -> None:
    job = job_of(Run.read(make_run("format=vector", "format.group_size=-1")))
    with pytest.raises(AptqError, match="cannot be trained"):
        enroll(AutoModelForCausalLM.from_pretrained(Run.read(make_run()).config["model"]["path"]), job)
