"""Levels with one scale a group."""

import pytest
import torch
from torch import Tensor

from aptq.api import Option
from aptq.formats.float import Float
from aptq.formats.integer import Integer
from aptq.quantizers.gptq import GPTQ
from aptq.quantizers.two_sided import TwoSided
from aptq.testing import check_format, check_quantizer


def test_keeps_the_contract_at_1_bit() -> None:
    check_format(Float(), bits=(1,))  # at 2, 3 and 4: test_testing.py


@pytest.mark.parametrize("format", [Float(code="fp"), Float(clip_steps=0, scale_dtype="bfloat16")])
def test_keeps_the_contract_whatever_the_options(format: Float) -> None:
    bits = (3, 4) if format.code == "fp" else (1, 2, 3, 4)
    check_format(format, bits=bits, group_sizes=(16,), shapes=((6, 40), (5, 33), (1, 1)))


@pytest.mark.parametrize("quantizer", [GPTQ(), TwoSided()])
def test_works_under_other_quantizers_than_nearest(quantizer: GPTQ | TwoSided) -> None:
    check_quantizer(quantizer, format=Float(), bits=(3, 4))


def _values(format: Float | Integer, weight: Tensor, option: Option, importance: Tensor | None = None) -> Tensor:
    grid = format.fit(weight[None], option, None if importance is None else importance[None])
    return grid.round(weight.T[None], slice(None))[1][0].T


def test_without_a_search_the_largest_magnitude_of_a_group_is_a_level() -> None:
    weight = torch.randn(5, 96)
    rounded = _values(Float(clip_steps=0, scale_dtype="float32"), weight, Option(4, 32))
    for part, found in zip(weight.split(32, 1), rounded.split(32, 1), strict=True):
        assert torch.allclose(part.abs().amax(1), found.abs().amax(1))


def test_the_search_lowers_the_error_that_counts() -> None:
    weight, importance = torch.randn(16, 128), torch.rand(128) ** 4
    plain, searched, weighed = (
        ((weight - _values(format, weight, Option(3, 64), given)) ** 2 * importance).sum()
        for format, given in ((Float(clip_steps=0), None), (Float(), None), (Float(), importance))
    )
    assert weighed < searched < plain


def test_normal_weights_lose_less_than_on_an_integer_grid() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = [(weight - _values(format, weight, Option(4, 64))).square().mean() for format in (Float(), Integer())]
    assert errors[0] < errors[1]
