"""Scales as they are stored: floats, powers of two, and floats of 8 bits."""

import math

import pytest
import torch

from aptq.api import AptqError, Option
from aptq.formats.asymmetric_float import AsymmetricFloat
from aptq.formats.float import Float
from aptq.formats.integer import Integer
from aptq.formats.scales import SCALE_DTYPES, pack_scales, read_scales, scale_layout, scale_unit, stored_scale
from aptq.testing import check_format

SCALES = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) ** 4 + 1e-6


@pytest.mark.parametrize("name", SCALE_DTYPES)
def test_what_is_stored_is_what_was_rounded_to(name: str) -> None:
    unit = scale_unit(SCALES.max(), name)
    rounded = stored_scale(SCALES, name, unit, 4)
    stored = pack_scales(rounded, name, unit)
    assert torch.equal(read_scales(stored, name), rounded)
    assert {key: (tuple(each.shape), each.dtype) for key, each in stored.items()} == scale_layout(3, 40, name)
    assert torch.equal(stored_scale(rounded, name, unit, 4), rounded)


def test_a_power_of_two_is_that_of_the_microscaling_specification() -> None:
    largest = torch.cat([SCALES.flatten(), torch.tensor([1.0, 3.9999998, 4.0, 5.0, 6.0, 7.9999995, 8.0])])
    expected = [2.0 ** (math.floor(math.log2(each)) - 2) for each in largest.tolist()]
    assert stored_scale(largest / 6, "e8m0", torch.ones(()), 4).tolist() == expected


def test_the_largest_scale_is_the_largest_number_of_e4m3() -> None:
    unit = scale_unit(SCALES.max(), "e4m3")
    rounded = stored_scale(SCALES, "e4m3", unit, 4)
    assert rounded.max() == pytest.approx(float(SCALES.max()), rel=1e-6)
    normal = SCALES / unit > 2.0**-6
    assert float(((rounded - SCALES).abs() / SCALES)[normal].max()) <= 1 / 16 + 1e-6
    assert bool((rounded > 0).all())


@pytest.mark.parametrize("name", SCALE_DTYPES)
def test_zeros_are_scaled_by_something_and_infinity_is_refused(name: str) -> None:
    zeros = torch.zeros(4)
    assert bool((stored_scale(zeros, name, scale_unit(zeros.max(), name), 4) > 0).all())
    wide = torch.tensor([1.0, float("inf")])
    with pytest.raises(AptqError, match="not finite"):
        stored_scale(wide, name, scale_unit(wide.max(), name), 4)


@pytest.mark.parametrize("name", SCALE_DTYPES)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_scale_that_is_not_finite_is_refused_whatever_it_is_rounded_to(value: float, name: str) -> None:
    with pytest.raises(AptqError, match="not finite"):
        stored_scale(torch.tensor([1.0, value]), name, torch.tensor(1.0), 4)


@pytest.mark.parametrize("name", ["e4m3", "e8m0"])
@pytest.mark.parametrize("format", [Float, AsymmetricFloat, Integer])
def test_formats_keep_their_contract_with_scales_of_eight_bits(
    format: type[Float | AsymmetricFloat | Integer], name: str
) -> None:
    check_format(format(scale_dtype=name, clip_steps=2), bits=(4,), shapes=((6, 40), (5, 33), (1, 1)))


def test_mxfp4_and_nvfp4_store_what_they_should() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    mx, nv = (
        Float(group_size=32, code="fp", scale_dtype="e8m0", clip_steps=0),
        Float(group_size=16, code="fp", scale_dtype="e4m3", clip_steps=0),
    )
    e2m1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    for format, size, stored_bits in ((mx, 32, 4.25), (nv, 16, 4.5)):
        option = Option(4, size)
        grid = format.fit(weight[None], option)
        quantized = grid.finish(grid.round(weight.T[None], slice(None))[0])
        values = format.dequantize(quantized, option)
        scale = read_scales(quantized.parameters, format.scale_dtype).T.repeat_interleave(size, 1)
        distance = (values.abs() / scale)[..., None] - e2m1
        assert float(distance.abs().amin(-1).max()) < 1e-6
        packed = format.pack(quantized, option)
        bits = sum(8 * each.numel() * each.element_size() for name, each in packed.items() if name != "scale_unit")
        assert bits / weight.numel() == stored_bits
