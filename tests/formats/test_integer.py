"""The integer grid against its definition."""

from itertools import product

import pytest
import torch

from aptq.api import AptqError, Option
from aptq.formats.integer import Integer
from aptq.testing import check_format


def test_keeps_the_contract_at_8_bits() -> None:
    check_format(Integer(), bits=(8,))  # at 2, 3 and 4: test_testing.py


@pytest.mark.parametrize(
    "format",
    [
        Integer(symmetric=True, scale_dtype="bfloat16"),
        Integer(clip="asymmetric"),
        Integer(clip="joint", clip_steps=2),
        Integer(clip_steps=0),
    ],
)
def test_keeps_the_contract_whatever_the_options(format: Integer) -> None:
    check_format(format, bits=(2, 3, 4, 8), group_sizes=(16,), shapes=((6, 40), (5, 33), (1, 1)))


def _values(format: Integer, weight: torch.Tensor, option: Option) -> torch.Tensor:
    grid = format.fit(weight[None], option)
    return grid.round(weight.T[None], slice(None))[1][0].T


def test_each_group_has_evenly_spaced_levels_and_holds_zero() -> None:
    weight = torch.randn(6, 150) + 0.5
    option = Option(3, 64)
    grid = Integer().fit(weight[None], option)
    levels = torch.linspace(-9, 9, 2000).expand(150, 6, 2000)
    for start in (0, 64, 128):  # the last group holds 22 columns
        for row in range(6):
            found = {
                round(grid.round(levels[:, :, i][None, start], start)[1][0, row].item(), 5) for i in range(0, 2000, 7)
            }
            assert len(found) == 8
            assert 0.0 in found
            steps = torch.tensor(sorted(found)).diff()
            assert torch.allclose(steps, steps.mean().expand_as(steps), rtol=1e-3)


def test_a_short_last_group_is_fitted_to_its_own_columns() -> None:
    weight = torch.randn(4, 70)
    weight[:, 64:] *= 1e-3
    error = (weight - _values(Integer(clip_steps=0), weight, Option(4, 64)))[:, 64:].abs().max()
    assert error < 1e-3 / 15 * 5, "the tail must not inherit the range of the groups before it"


def test_rounding_error_is_at_most_half_a_step() -> None:
    weight = torch.randn(8, 64)
    step = (weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0)) / 15
    error = weight - _values(Integer(clip_steps=0), weight, Option(4, -1))
    assert bool((error.abs() <= 0.51 * step[:, None] + 1e-3).all())


def test_symmetric_grid_mirrors() -> None:
    weight = torch.randn(5, 64)
    weight = torch.where(weight.abs() == weight.abs().amax(1, keepdim=True), 0.9 * weight, weight)
    inner = weight.abs() < 0.8 * weight.abs().amax(1, keepdim=True)  # the outermost negative level has no mirror image
    option, format = Option(4, -1), Integer(symmetric=True, clip_steps=0)
    assert torch.equal(_values(format, weight, option)[inner], -_values(format, -weight, option)[inner])


def _best_of_all_pairs(weight: torch.Tensor, option: Option, steps: int) -> torch.Tensor:
    """Return the least error of each row, of all pairs of ends."""
    shares = [1 - 0.5 * step / steps for step in range(steps + 1)]
    top, errors = (1 << option.bits) - 1, []
    for a, b in product(shares, shares):
        low, high = a * weight.amin(1, keepdim=True), b * weight.amax(1, keepdim=True)
        scale = ((high - low) / top).half().float()
        zero = (-low / scale).round().clamp(0, top)
        rounded = ((weight / scale + zero).round().clamp(0, top) - zero) * scale
        errors.append((weight - rounded).square().sum(1))
    return torch.stack(errors).amin(0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ends_searched_by_themselves_come_near_to_the_best_pair(bits: int) -> None:
    weight = torch.randn(200, 64).exp() - 1.5  # skewed
    option = Option(bits, -1)
    shared, apart = (
        (weight - _values(Integer(clip=clip), weight, option)).square().sum(1) for clip in ("shared", "asymmetric")
    )
    best = _best_of_all_pairs(weight, option, 8)
    assert bool((apart <= shared * (1 + 1e-5)).all())
    assert apart.sum() - best.sum() < 0.5 * (shared.sum() - best.sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ends_searched_jointly_are_the_best_pair(bits: int) -> None:
    weight = torch.randn(200, 64).exp() - 1.5  # skewed
    error = (weight - _values(Integer(clip="joint"), weight, Option(bits, -1))).square().sum(1)
    assert torch.allclose(error, _best_of_all_pairs(weight, Option(bits, -1), 8), rtol=1e-4)


def test_clip_search_never_fits_worse_than_the_full_range() -> None:
    weight = torch.randn(16, 256) ** 3  # heavy tails
    importance = torch.rand(1, 256)
    option = Option(2, 64)

    def error(format: Integer) -> torch.Tensor:
        value = format.fit(weight[None], option, importance).round(weight.T[None], slice(None))[1][0].T
        return ((value - weight).square() * importance).sum()

    assert error(Integer(clip_steps=10)) < 0.9 * error(Integer(clip_steps=0))


def test_zeros_and_constants_survive() -> None:
    assert torch.equal(_values(Integer(), torch.zeros(3, 40), Option(2, 32)), torch.zeros(3, 40))
    constant = torch.full((2, 32), 0.25)
    assert torch.allclose(_values(Integer(clip_steps=0), constant, Option(2, 32)), constant, rtol=1e-3)


def test_storage_counts_codes_scales_and_packed_zeros() -> None:
    layout = Integer().packed_layout(Option(3, 64), (576, 1536))
    bits = sum(torch.Size(shape).numel() * dtype.itemsize * 8 for shape, dtype in layout.values())
    assert bits / (576 * 1536) == pytest.approx(3 + (16 + 3) / 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_dtype": "int8"}, "scale_dtype"),
        ({"group_size": 0}, "group_size=0"),
        ({"clip_steps": -1}, "clip_steps"),
        ({"clip": "both"}, "use one of shared, asymmetric, joint"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(AptqError, match=message):
        Integer(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range_name_the_range(bits: int) -> None:
    with pytest.raises(AptqError, match="2 to 8 bits"):
        Integer().check(Option(bits, 64), (8, 64))


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(AptqError, match="NaN and Inf"):
        Integer().fit(torch.full((1, 2, 32), float("inf")), Option(4, 32))
