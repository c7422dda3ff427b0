"""The losses against sums over the vocabulary written out, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aptq_bitdistiller.loss import confidence, cross_entropy, divergence, masked_mean


def _logits(seed: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 3, 4, 11, generator=generator, dtype=torch.float64) * scale
    return student, teacher


def _probabilities(logits: Tensor) -> list[float]:
    total = sum(math.exp(value) for value in logits.tolist())
    return [math.exp(value) / total for value in logits.tolist()]


def _kl(first: list[float], second: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_cakld_weighs_the_reverse_divergence_by_gamma(gamma: float) -> None:
    student, teacher = _logits(0)
    found = divergence(student, teacher, gamma)
    for row in range(3):
        for token in range(4):
            q, p = _probabilities(student[row, token]), _probabilities(teacher[row, token])
            expected = gamma * _kl(q, p) + (1 - gamma) * _kl(p, q)
            assert found[row, token].item() == pytest.approx(expected, rel=1e-12)


def test_a_sure_teacher_has_its_student_seek_one_mode_and_an_unsure_one_cover_all() -> None:
    """Of two students of a teacher with two modes, gamma = 1 prefers the one on one mode, gamma = 0 the broad one."""
    teacher = torch.tensor([0.495, 0.495, 0.005, 0.005]).log()
    one_mode = torch.tensor([0.97, 0.01, 0.01, 0.01]).log()
    broad = torch.tensor([0.25, 0.25, 0.25, 0.25]).log()
    reverse, forward = ([divergence(each, teacher, gamma).item() for each in (one_mode, broad)] for gamma in (1.0, 0.0))
    assert reverse[0] < reverse[1]
    assert forward[0] > forward[1]


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0.01, 30))
def test_cakld_is_positive_and_zero_for_equals(seed: int, gamma: float, scale: float) -> None:
    student, teacher = _logits(seed, scale)
    assert bool((divergence(student, teacher, gamma) >= -1e-9).all())
    assert torch.allclose(divergence(teacher + 5, teacher, gamma), torch.zeros(3, 4, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_the_gradient_is_the_one_on_paper(gamma: float) -> None:
    """With r = log q - log p: d/dz = gamma q (r - sum q r) + (1 - gamma) (q - p)."""
    student, teacher = _logits(1)
    student.requires_grad_()
    (found,) = torch.autograd.grad(divergence(student, teacher, gamma).sum(), student)
    q, p = student.detach().softmax(-1), teacher.softmax(-1)
    ratio = q.log() - p.log()
    expected = gamma * q * (ratio - (q * ratio).sum(-1, keepdim=True)) + (1 - gamma) * (q - p)
    assert torch.allclose(found, expected, atol=1e-12)


def test_logits_of_any_size_stay_finite() -> None:
    student, teacher = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    for gamma in (0.0, 0.5, 1.0):
        assert bool(divergence(student, teacher, gamma).isfinite().all())


def test_confidence_and_cross_entropy_are_of_the_realised_token() -> None:
    logits, _ = _logits(2)
    tokens = torch.arange(12).view(3, 4) % 11
    for row in range(3):
        for at in range(4):
            expected = _probabilities(logits[row, at])[int(tokens[row, at])]
            assert confidence(logits, tokens)[row, at].item() == pytest.approx(expected, rel=1e-12)
            assert cross_entropy(logits, tokens)[row, at].item() == pytest.approx(-math.log(expected), rel=1e-12)


def test_what_is_masked_does_not_count() -> None:
    values = torch.tensor([[1.0, 2.0, float("nan")], [3.0, float("inf"), 4.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(values, mask).item() == 2.0
    assert masked_mean(values, torch.zeros_like(mask)).item() == 0.0
