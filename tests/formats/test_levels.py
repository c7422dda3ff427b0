"""Levels of normal and floating-point codes, and rounding to them."""

from dataclasses import replace

import pytest
import torch

from aptq.api import AptqError, Option
from aptq.backends.select import choose_backend
from aptq.formats.asymmetric_float import AsymmetricFloat
from aptq.formats.float import Float
from aptq.formats.levels import LevelFormat, levels, nearest
from aptq.testing import check_backend
from tests.backends.specs import spec_of


@pytest.mark.parametrize(
    ("code", "bits", "published"),
    [
        ("fp", 3, [-4, -2, -1, 0, 1, 2, 4]),
        ("fp", 4, [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        ("normal", 3, [-1, -0.5350227, -0.2469314, 0, 0.1833375, 0.3819939, 0.6229857, 1]),
        (
            "normal",
            4,
            [
                *(-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0, 0.0795803, 0.1609302),
                *(0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1),
            ],
        ),
    ],
)
def test_levels_are_those_published(code: str, bits: int, published: list[float]) -> None:
    top = published[-1]
    assert levels(code, bits) == pytest.approx([value / top for value in published], abs=2e-6)


def test_two_bits_have_one_level_below_zero_and_two_above() -> None:
    low, zero, middle, high = levels("normal", 2)
    assert (low, zero, high) == (-1, 0, 1)
    assert 0.3 < middle < 0.6


def test_the_nearest_level_is_the_one_at_the_least_distance() -> None:
    table = torch.tensor(levels("normal", 4), dtype=torch.float64)
    values = torch.randn(7, 50, dtype=torch.float64)
    below, above = torch.rand(2, 7, 1, dtype=torch.float64) + 0.2
    codes, rounded = nearest(values, table, below, above)
    grid = torch.where(table < 0, below, above) * table  # [7, levels]
    distance = (values[..., None] - grid[:, None]).abs()
    assert torch.equal(codes, distance.argmin(-1))
    assert torch.allclose((values - rounded).abs(), distance.amin(-1))


def test_bits_that_a_code_has_not_are_refused() -> None:
    with pytest.raises(AptqError, match="have 3, 4 bits; got bits=2"):
        Float(code="fp").check(Option(2, 64), (8, 64))
    with pytest.raises(AptqError, match="have 1, 2, 3, 4 bits; got bits=8"):
        Float().check(Option(8, 64), (8, 64))
    with pytest.raises(AptqError, match="use one of normal, fp"):
        Float(code="nf")
    with pytest.raises(AptqError, match="group size"):
        Float().check(Option(3, 0), (8, 64))


def test_one_bit_is_a_sign_and_the_mean_magnitude_of_its_side() -> None:
    weight = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    importance = torch.rand(1, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    option = Option(1, 32)

    def error(format: LevelFormat, factor: float = 1.0) -> float:
        grid = format.fit(weight, option, importance)
        grid = replace(grid, parameters=tuple(each * factor for each in grid.parameters))
        rounded = grid.round(weight.transpose(1, 2), slice(None))[1].transpose(1, 2)
        return float(((rounded - weight).square() * importance[:, None]).sum())

    for format in (Float(scale_dtype="float32"), AsymmetricFloat(scale_dtype="float32")):
        assert error(format) < min(error(format, 0.98), error(format, 1.02)), "the scale of least error"
    assert error(AsymmetricFloat(scale_dtype="float32")) < error(Float(scale_dtype="float32"))
    mean = (weight[..., :32].abs() * importance[:, None, :32]).sum(-1) / importance[:, :32].sum()
    scale = Float(scale_dtype="float32").fit(weight, option, importance).parameters[1]
    assert torch.allclose(scale[:, 0], mean, rtol=1e-6)


def test_one_bit_of_nothing_is_nothing() -> None:
    option = Option(1, 32)
    for size in (0.0, 1e-12):  # rounds to 0 in 16 bits
        weight = torch.full((1, 2, 32), size)
        grid = Float().fit(weight, option)
        assert not Float().dequantize(grid.finish(grid.round(weight.transpose(1, 2), slice(None))[0]), option).any()
    idle = Float().fit(torch.full((1, 2, 32), 0.5), option, torch.zeros(1, 32))
    assert torch.equal(idle.parameters[1], torch.full((1, 1, 2), 0.5))
    with pytest.raises(AptqError, match="have 2, 3, 4 bits; got bits=1"):
        Float(scale_dtype="e8m0").check(option, (2, 32))


def test_a_weight_of_zero_takes_the_scale_of_the_sign_that_it_gets() -> None:
    codes, values = nearest(torch.zeros(1), torch.tensor([-1.0, 1.0]), torch.tensor([2.0]), torch.tensor([3.0]))
    assert values.item() == (-2.0, 3.0)[int(codes)]


def test_layers_of_signs_are_multiplied_by_what_can_read_them() -> None:
    choice = choose_backend(spec_of(Float(), Option(1, 32), (64, 64)))
    assert choice.refusals.get("cpu") in (None, "it reads levels of 2 to 4 bits, not 1")
    for format in (Float(), AsymmetricFloat()):
        check_backend(choice.backend, format=format, bits=(1,))
