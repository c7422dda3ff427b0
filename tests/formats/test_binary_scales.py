"""Scales of binarized weights, against brute force in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aptq.formats.binary_scales import one_scale, residual_scales, split_scales

Scales = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _problem(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return heavy-tailed weights ``[3, count]``, some equal or 0, and weights of their errors ``[count]``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, count, dtype=torch.float64, generator=generator)
    values[1] = (values[1] * 2).round()
    return values * values.abs(), torch.rand(count, dtype=torch.float64, generator=generator) ** 4 + 1e-6


def _error(scales: tuple[Tensor, Tensor], values: Tensor, counted: Tensor) -> Tensor:
    """Return the weighted squared error ``[rows]`` with the nearer of two scales for each magnitude."""
    distance = [(values.abs() - scale[:, None]).square() for scale in scales]
    return (torch.minimum(*distance) * counted).sum(-1)


def _every_break(values: Tensor, counted: Tensor) -> Tensor:
    """Return the least error ``[rows]`` of splits at every threshold, by themselves and with means of their own."""
    least = []
    for row in values.abs():
        found = []
        for threshold in row:
            error = 0.0
            for part in (row <= threshold, row > threshold):
                if part.any():
                    mean = (row[part] * counted[part]).sum() / counted[part].sum()
                    error += float(((row[part] - mean).square() * counted[part]).sum())
            found.append(error)
        least.append(min(found))
    return torch.tensor(least, dtype=torch.float64)


def _binarized(values: Tensor, counted: Tensor) -> Tensor:
    """Return one pass of binarization: signs times the mean magnitude of their row."""
    scale = (values.abs() * counted).sum(-1) / counted.sum()
    return torch.where(values < 0, -1.0, 1.0) * scale[:, None]


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_the_break_point_is_the_best_there_is(count: int, seed: int) -> None:
    values, counted = _problem(count, seed)
    found = _error(split_scales(values.abs(), counted), values, counted)
    assert torch.allclose(found, _every_break(values, counted), rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_two_passes_lose_no_more_than_one_and_a_break_no_more_than_those(count: int, seed: int) -> None:
    values, counted = _problem(count, seed)
    errors = [
        _error(scales(values.abs(), counted), values, counted) for scales in (one_scale, residual_scales, split_scales)
    ]
    assert bool((errors[1] <= errors[0] + 1e-12).all())
    assert bool((errors[2] <= errors[1] + 1e-12).all())


def test_two_passes_are_those_of_the_paper_or_better_by_rounding() -> None:
    values, counted = _problem(50, seed=3)
    first = _binarized(values, counted)
    second = _binarized(values - first, counted)
    low, high = residual_scales(values.abs(), counted)
    magnitudes = (first + second).abs()
    of_either = torch.minimum((magnitudes - low[:, None]).abs(), (magnitudes - high[:, None]).abs())
    assert float(of_either.max()) < 1e-12, "the published values are those that the scales allow"
    published = ((values - first - second).square() * counted).sum(-1)
    assert bool((_error((low, high), values, counted) <= published + 1e-12).all())
    fall = ((values - first).square() * counted).sum(-1) - published
    assert torch.allclose(fall, second[:, 0].square() * counted.sum())


@pytest.mark.parametrize("scales", [one_scale, residual_scales, split_scales])
def test_equal_magnitudes_lose_nothing(scales: Scales) -> None:
    values = torch.tensor([[0.5, -0.5, 0.5], [0.0, 0.0, 0.0]], dtype=torch.float64)
    low, high = scales(values.abs(), torch.ones(3, dtype=torch.float64))
    assert low.tolist() == high.tolist() == [0.5, 0.0]


def test_weights_of_errors_draw_scales_to_them() -> None:
    magnitudes = torch.tensor([[1.0, 2.0, 10.0]], dtype=torch.float64)
    assert one_scale(magnitudes, torch.tensor([1.0, 1.0, 8.0]))[0].item() == pytest.approx(8.3)
    low, high = split_scales(magnitudes, torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64))
    assert (low.item(), high.item()) == (pytest.approx(1.25), pytest.approx(10.0))
