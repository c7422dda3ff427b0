"""Levels with a scale for each side of zero."""

import pytest
import torch
from torch import Tensor

from aptq.api import Option
from aptq.formats.asymmetric_float import AsymmetricFloat
from aptq.formats.float import Float
from aptq.quantizers.gptq import GPTQ
from aptq.quantizers.two_sided import TwoSided
from aptq.testing import check_format, check_quantizer


def test_keeps_the_contract_at_1_bit() -> None:
    check_format(AsymmetricFloat(), bits=(1,))  # at 2, 3 and 4: test_testing.py


@pytest.mark.parametrize("format", [AsymmetricFloat(code="fp"), AsymmetricFloat(clip_steps=0)])
def test_keeps_the_contract_whatever_the_options(format: AsymmetricFloat) -> None:
    bits = (3, 4) if format.code == "fp" else (1, 2, 3, 4)
    check_format(format, bits=bits, group_sizes=(16,), shapes=((6, 40), (5, 33), (1, 1)))


@pytest.mark.parametrize("quantizer", [GPTQ(), TwoSided()])
def test_works_under_other_quantizers_than_nearest(quantizer: GPTQ | TwoSided) -> None:
    check_quantizer(quantizer, format=AsymmetricFloat(), bits=(3, 4))


def _values(format: Float, weight: Tensor, option: Option) -> Tensor:  # or AsymmetricFloat
    return format.fit(weight[None], option).round(weight.T[None], slice(None))[1][0].T


@pytest.mark.parametrize("code", ["normal", "fp"])
def test_is_the_symmetric_format_where_the_range_is(code: str) -> None:
    weight = torch.randn(6, 64).clamp(-1.5, 1.5)
    weight[:, 0], weight[:, 1] = 1.5, -1.5
    one, two = (format(code=code, clip_steps=0) for format in (Float, AsymmetricFloat))
    assert torch.equal(_values(one, weight, Option(3, 64)), _values(two, weight, Option(3, 64)))  # type: ignore[arg-type]


def test_each_side_has_the_range_of_its_own_weights() -> None:
    weight = torch.randn(6, 64)
    weight = torch.where(weight < 0, 0.1 * weight, weight)
    format = AsymmetricFloat(clip_steps=0, scale_dtype="float32")
    rounded = _values(format, weight, Option(4, -1))  # type: ignore[arg-type]
    assert torch.allclose(rounded.amin(1), weight.amin(1))
    assert torch.allclose(rounded.amax(1), weight.amax(1))
    symmetric = _values(Float(clip_steps=0), weight, Option(4, -1))
    below = weight < 0
    assert (weight - rounded)[below].square().sum() < 0.1 * (weight - symmetric)[below].square().sum()


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_group_of_one_sign_can_still_be_rounded_on_the_other_side(sign: int) -> None:
    weight = sign * torch.rand(4, 64)
    grid = AsymmetricFloat().fit(weight[None], Option(3, 64))
    rounded = grid.round(weight.T[None], slice(None))[1][0].T
    assert bool((rounded * sign >= 0).all())
    assert (weight - rounded).abs().max() < 0.3
    moved = grid.round(-weight.T[None], slice(None))[1][0].T  # what error feedback may lead to
    assert (-weight - moved).abs().max() < 0.5


def test_the_two_searches_do_not_mind_each_other() -> None:
    """Each side's error is that of a search with the other side left out."""
    weight = torch.randn(8, 64)
    format = AsymmetricFloat()
    both = _values(format, weight, Option(3, 64))  # type: ignore[arg-type]
    above = _values(format, weight.clamp(min=0), Option(3, 64))  # type: ignore[arg-type]
    below = _values(format, weight.clamp(max=0), Option(3, 64))  # type: ignore[arg-type]
    assert torch.equal(both, torch.where(weight > 0, above, below))


def test_two_scales_store_what_a_scale_and_a_zero_of_16_bits_do() -> None:
    layout = AsymmetricFloat().packed_layout(Option(4, 128), (32, 256))
    bits = sum(torch.Size(shape).numel() * dtype.itemsize * 8 for shape, dtype in layout.values())
    assert bits / (32 * 256) == 4.25
