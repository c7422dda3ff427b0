"""A few weights in 16 bits beside another format."""

import pytest
import torch
from torch import Tensor

from aptq.api import AptqError, Curvature, Option
from aptq.backends.select import choose_backend
from aptq.calibration.quantize import storage_bits
from aptq.formats.asymmetric_float import AsymmetricFloat
from aptq.formats.integer import Integer
from aptq.formats.mixed import Mixed
from aptq.formats.outliers import OutlierGrid, Outliers
from aptq.formats.scaled import Scaled, weighted_error
from aptq.formats.vector import Vector
from aptq.quantizers.gptq import GPTQ
from aptq.quantizers.nearest import Nearest
from aptq.quantizers.two_sided import TwoSided
from aptq.registry import build
from aptq.testing import check_backend, check_format, check_quantizer
from tests.backends.specs import spec_of

OPTION = Option(2, 32)


@pytest.mark.parametrize(
    "format",
    [
        Outliers(inner=Integer(clip_steps=0), share=0.05),
        Outliers(inner=AsymmetricFloat(clip_steps=0), share=0.02, value_dtype="bfloat16"),
        Outliers(inner=Integer(clip_steps=2), share=0.0),
    ],
)
def test_keeps_the_contract(format: Outliers) -> None:
    check_format(format, bits=(3,), group_sizes=(32,))


@pytest.mark.parametrize("quantizer", [Nearest(), GPTQ(), TwoSided()])
def test_works_under_every_kind_of_quantizer(quantizer: GPTQ) -> None:
    check_quantizer(quantizer, format=Outliers(inner=Integer(clip_steps=2), share=0.02), bits=(3,))


def _problem() -> tuple[Tensor, Tensor]:
    """Return a heavy-tailed weight ``[2, 24, 96]`` and importances."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(2, 24, 96, generator=generator)
    return weight * weight.abs(), torch.rand(2, 96, generator=generator) + 0.1


def _hessian(heads: int, width: int) -> Tensor:
    inputs = torch.randn(heads, 2 * width, width, generator=torch.Generator().manual_seed(7)) + 0.5
    return inputs.transpose(1, 2) @ inputs / (2 * width)


@pytest.mark.parametrize("inner", [Integer(clip_steps=0), Integer(), AsymmetricFloat()])
def test_the_more_outliers_the_less_error(inner: Integer | AsymmetricFloat) -> None:
    weight, importance = _problem()
    shares = (0.0, 0.005, 0.02, 0.1)
    grids = [Outliers(inner=inner, share=share).fit(weight, OPTION, importance) for share in shares]
    errors = [weighted_error(grid, weight, importance) for grid in grids]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == weighted_error(inner.fit(weight, OPTION, importance), weight, importance)
    assert errors[2] < 0.8 * errors[0], "the range of the others shrinks with them"


@pytest.mark.parametrize("quantizer", [Nearest(), GPTQ(), GPTQ(act_order=False, refine=1), TwoSided()])
def test_the_more_outliers_the_less_error_of_outputs(quantizer: GPTQ) -> None:
    weight, _ = _problem()
    curvature = Curvature(column=_hessian(2, 96), row=_hessian(2, 24), tokens=64)
    factors = quantizer.prepare(curvature)
    errors = []
    for share in (0.0, 0.01, 0.05):
        format = Outliers(inner=Integer(), share=share)
        dense = format.dequantize(quantizer.quantize(weight.view(48, 96), factors, format, OPTION).weight, OPTION)
        difference = dense.view(weight.shape) - weight
        errors.append(float(((_hessian(2, 24) @ difference @ curvature.column) * difference).sum()))
    assert errors[1] < 0.97 * errors[0]
    assert errors[2] < 0.9 * errors[1]


def test_without_outliers_it_is_the_other_format() -> None:
    weight, importance = _problem()
    formats = (Integer(), Outliers(inner=Integer(), share=0.0))
    grids = [format.fit(weight, OPTION, importance) for format in formats]
    stored = [grid.finish(grid.round(weight.transpose(1, 2) + 0.1, slice(None))[0]) for grid in grids]
    plain, outliers = (format.pack(each, OPTION) for format, each in zip(formats, stored, strict=True))
    assert all(torch.equal(outliers[name], tensor) for name, tensor in plain.items())
    assert not outliers["outlier_counts"].any()
    assert len(outliers["outlier_values"]) == 0


def test_outliers_leave_no_error_to_later_columns() -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(6))
    column = _hessian(1, 32)
    column[:, 5] *= 1000  # the first in the order of columns, and all that costs anything
    column[:, :, 5] *= 1000
    quantizer, format = GPTQ(refine=0), Outliers(inner=Integer(clip_steps=0), share=1 / 32)
    factors = quantizer.prepare(Curvature(column=column, tokens=64))
    results = []
    for kept in (0.3125, 0.625):  # exact in 16 bits
        weight[:, 5] = kept
        rounded = quantizer.quantize(weight, factors, format, OPTION)
        assert isinstance(rounded.grid, OutlierGrid)
        assert rounded.grid.mask[0, 5].all()
        results.append(format.dequantize(rounded.weight, OPTION))
        assert torch.equal(results[-1][:, 5], weight[:, 5])
    others = torch.arange(32) != 5
    assert torch.equal(results[0][:, others], results[1][:, others])


def test_what_is_kept_costs_most_and_comes_back_as_it_was() -> None:
    weight, importance = _problem()
    inner = Integer(clip_steps=0)
    format = Outliers(inner=inner, share=0.01, value_dtype="bfloat16")
    columns = weight.transpose(1, 2)
    cost = (inner.fit(weight, OPTION).round(columns, slice(None))[1] - columns).square() * importance[..., None]
    grid = format.fit(weight, OPTION, importance)
    count = round(0.01 * weight.numel())
    assert grid.mask.sum() == count
    assert cost[grid.mask].min() >= cost[~grid.mask].max()
    drifted = columns + 0.1  # as error feedback leaves them
    codes, rounded = grid.round(drifted, slice(None))
    expected = drifted[grid.mask].to(torch.bfloat16).float()
    assert torch.equal(rounded[grid.mask], expected)
    dense = format.dequantize(grid.finish(codes), OPTION)
    assert torch.equal(dense[grid.mask.transpose(1, 2).reshape(48, 96)].sort().values, expected.sort().values)


def test_all_that_is_stored_is_counted() -> None:
    inner, shape = Integer(), (64, 128)
    more = storage_bits(Outliers(inner=inner, share=0.01), OPTION, shape) - storage_bits(inner, OPTION, shape)
    assert more == 32 * round(0.01 * 64 * 128) + 16 * 64
    wide = Outliers(inner=inner).packed_layout(OPTION, (2, 40000))
    assert wide["outlier_columns"][1] == wide["outlier_counts"][1] == torch.int32


def test_what_reads_packed_codes_refuses_it_and_the_reference_takes_it() -> None:
    choice = choose_backend(spec_of(Outliers(inner=Integer(symmetric=True)), Option(4, 32), (64, 64)))
    assert choice.name == "reference"
    assert "cannot read outlier_columns" in choice.refusals["cpu"]
    check_backend(choice.backend, format=Outliers(inner=Integer(), share=0.02), bits=(4,))


def test_formats_that_cannot_be_around_are_refused() -> None:
    with pytest.raises(AptqError, match="codes each weight by itself"):
        Outliers(inner=Vector()).check(Option(2, -1), (64, 64))
    with pytest.raises(AptqError, match="leave its finetune out"):
        Outliers(inner=Integer(finetune=True)).check(OPTION, (64, 64))
    with pytest.raises(AptqError, match="keeps outliers itself"):
        Outliers(inner=Scaled(inner=Outliers(inner=Integer()))).check(OPTION, (64, 64))
    with pytest.raises(AptqError, match="several formats"):
        Outliers(inner=Mixed(formats={"integer": Integer()}))
    with pytest.raises(AptqError, match="from 0 to 0.5"):
        Outliers(inner=Integer(), share=0.7)
    with pytest.raises(AptqError, match="value_dtype"):
        Outliers(inner=Integer(), value_dtype="float32")
    assert build("format", {"name": "outliers", "inner": {"name": "integer"}}) == Outliers(inner=Integer())
