"""Quantiles by a few operations on integers of 16 bits."""

import pytest
import torch

from aptq.kernels.quantiles import UNIT, multiplier_of, quantiles


@pytest.mark.parametrize("bits", [8, 10, 12])
def test_they_are_near_those_of_the_normal_distribution(bits: int) -> None:
    values = quantiles(1, bits).double()
    exact = torch.special.ndtri((torch.arange(1 << bits).double() + 0.5) / (1 << bits))
    scale = (values * exact).sum() / exact.square().sum()
    assert float((values / scale - exact).square().mean().sqrt()) < 0.09
    assert float(scale) == pytest.approx(0.75, abs=0.02)
    assert (values.diff() >= 0).all()
    assert ((values + values.flip(0)).abs() <= UNIT).all()


@pytest.mark.parametrize("bits", [1, 9, 10, 15])
def test_they_are_integers_of_eleven_bits_in_their_unit_and_the_formula_to_three(bits: int) -> None:
    values = quantiles(1, bits)
    assert torch.equal(values.half().float(), values)
    assert torch.equal((values / UNIT).round(), values / UNIT)
    t = (2 * torch.arange(1 << bits).double() + 1) / (1 << bits) - 1
    assert ((t * (1 + t**4 / 2 + t**64) - values).abs() <= 3 * UNIT).all()


def test_a_multiplier_puts_them_in_another_order() -> None:
    ranks = torch.arange(1 << 10) * 903 % (1 << 10)
    assert torch.equal(quantiles(903, 10), quantiles(1, 10)[ranks])


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("multiplier", [1, 7, 245])
def test_their_multiplier_is_found(multiplier: int, bits: int) -> None:
    assert multiplier_of(quantiles(multiplier, bits)) == multiplier


def test_other_values_have_none() -> None:
    values = quantiles(7, 10)
    other = values.clone()
    other[77] += UNIT
    for none in (other, values * 2, torch.randn(1 << 10), values[:1000]):
        assert multiplier_of(none) is None


@pytest.mark.parametrize("bits", [0, 16])
def test_bits_that_do_not_fit_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits} is not allowed; use 1 to 15"):
        quantiles(1, bits)
