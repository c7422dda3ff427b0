"""Factors of input channels around another format."""

import pytest
import torch
from torch import Tensor

from aptq.api import AptqError, Grid, Option, RefitGrid
from aptq.formats.asymmetric_float import AsymmetricFloat
from aptq.formats.integer import Integer
from aptq.formats.mixed import Mixed
from aptq.formats.scaled import Scaled, weighted_error
from aptq.formats.vector import Vector
from aptq.quantizers.gptq import GPTQ
from aptq.quantizers.nearest import Nearest
from aptq.quantizers.two_sided import TwoSided
from aptq.registry import build
from aptq.testing import check_format, check_quantizer

SCALED = Scaled(inner=Integer(clip_steps=2), steps=2)


@pytest.mark.parametrize(
    "format", [SCALED, Scaled(inner=AsymmetricFloat(clip_steps=0), steps=1, scale_dtype="float32")]
)
def test_keeps_the_contract(format: Scaled) -> None:
    check_format(format, bits=(3,), group_sizes=(32,))


@pytest.mark.parametrize("quantizer", [Nearest(), GPTQ(), TwoSided()])
def test_works_under_every_kind_of_quantizer(quantizer: GPTQ) -> None:
    check_quantizer(quantizer, format=SCALED, bits=(3,))


def _problem(heads: int = 1) -> tuple[Tensor, Tensor]:
    """Return a weight ``[heads, 24, 96]`` and importances with a few channels that count a hundred times as much."""
    generator = torch.Generator().manual_seed(3)
    importance = torch.rand(heads, 96, generator=generator) + 0.5
    importance[:, ::17] *= 100
    return torch.randn(heads, 24, 96, generator=generator), importance


@pytest.mark.parametrize("inner", [Integer(clip_steps=0), Integer(), AsymmetricFloat()])
def test_channels_that_count_are_rounded_finer(inner: Integer | AsymmetricFloat) -> None:
    weight, importance = _problem()
    option = Option(3, 32)
    plain, grid = (format.fit(weight, option, importance) for format in (inner, Scaled(inner=inner)))
    assert weighted_error(grid, weight, importance) < 0.9 * weighted_error(plain, weight, importance)
    assert grid.natural[::17].max() < grid.natural[1::17].min(), "their factors are the smallest"


def test_the_exponent_is_the_best_of_those_that_are_tried() -> None:
    weight, importance = _problem(heads=2)
    option, best = Option(3, 32), Scaled(inner=Integer(), steps=4)
    channels = importance.mean(0)
    errors = []
    for step in range(5):
        factors = (channels / channels.log().mean().exp()).pow(-step / 8).half().float()
        grid = Integer().fit(weight / factors, option, importance * factors.square())
        rounded = grid.round((weight / factors).transpose(1, 2), slice(None))[1].transpose(1, 2) * factors
        errors.append(float(((rounded - weight).square() * importance[:, None]).sum()))
    assert weighted_error(best.fit(weight, option, importance), weight, importance) == pytest.approx(
        min(errors), rel=1e-4
    )
    assert min(errors) < errors[0]


def test_without_importance_and_where_all_channels_count_alike_it_is_the_other_format() -> None:
    weight, _ = _problem()
    plain = Integer().fit(weight, Option(3, 32), torch.ones(1, 96)).round(weight.transpose(1, 2), slice(None))[1]
    for importance in (torch.ones(1, 96), torch.zeros(1, 96)):
        grid = Scaled(inner=Integer()).fit(weight, Option(3, 32), importance)
        assert torch.equal(grid.natural, torch.ones(96))
        if importance.any():
            assert torch.equal(grid.round(weight.transpose(1, 2), slice(None))[1], plain)
    assert torch.equal(Scaled(inner=Integer()).fit(weight, Option(3, 32)).natural, torch.ones(96))


def test_channels_without_inputs_have_finite_factors() -> None:
    weight, importance = _problem()
    importance[:, :5] = 0
    grid = Scaled(inner=Integer()).fit(weight, Option(3, 32), importance)
    assert grid.natural.isfinite().all()
    assert grid.round(weight.transpose(1, 2), slice(None))[1].isfinite().all()


def test_it_comes_from_its_section_and_mistakes_are_told() -> None:
    built = build("format", {"name": "scaled", "inner": {"name": "integer", "clip": "asymmetric"}, "steps": 3})
    assert built == Scaled(inner=Integer(clip="asymmetric"), steps=3)
    with pytest.raises(AptqError, match="Did you mean 'integer'"):
        build("format", {"name": "scaled", "inner": {"name": "intger"}})
    with pytest.raises(AptqError, match="inner cannot be 'integer'"):
        build("format", {"name": "scaled", "inner": "integer"})
    with pytest.raises(AptqError, match=r"format\.steps=0"):
        Scaled(inner=Integer(), steps=0)
    with pytest.raises(AptqError, match="scale_dtype='int8'"):
        Scaled(inner=Integer(), scale_dtype="int8")
    with pytest.raises(AptqError, match="several formats"):
        Scaled(inner=Mixed(formats={"integer": Integer()}))


def test_codebooks_learn_from_error_feedback_under_the_factors() -> None:
    weight, importance = _problem()
    option = Option(2, -1)
    scaled = Scaled(inner=Vector(refits=1), steps=1)
    grid = scaled.fit(weight, option, importance)
    assert isinstance(grid, RefitGrid)
    columns = (weight + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))).transpose(1, 2)
    refitted = grid.refit(columns)
    assert isinstance(refitted, RefitGrid)

    def error(grid: Grid) -> float:
        return float(((grid.round(columns, slice(None))[1] - columns).square().sum(-1) * importance).sum())

    assert error(refitted) < error(grid)
    assert refitted.refit(columns) is None, "as often as the format says"
