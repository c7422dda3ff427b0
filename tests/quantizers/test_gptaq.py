"""GPTAQ's target against dense least squares in float64, and what it is for: the full-precision model's output."""

import pytest
import torch
from torch import Tensor

from aptq.api import AptqError, Curvature, DriftQuantizer, Option
from aptq.formats.integer import Integer
from aptq.quantizers.factors import Damping, factorize
from aptq.quantizers.gptaq import GPTAQ, target_shift
from aptq.quantizers.gptq import GPTQ
from aptq.testing import check_quantizer

OPTION = Option(4, 32)


def _inputs(width: int = 48, tokens: int = 400, size: float = 0.3) -> tuple[Tensor, Tensor]:
    """Return correlated ``X [in, tokens]``, float64, and ``X_f`` that differs from it by what depends on ``X``."""
    generator = torch.Generator().manual_seed(0)
    mix, change = (torch.randn(width, width, generator=generator, dtype=torch.float64) for _ in range(2))
    noise = torch.randn(width, tokens, generator=generator, dtype=torch.float64)
    x = mix @ torch.randn(width, tokens, generator=generator, dtype=torch.float64)
    return x, x + size * (change @ x / width**0.5 + noise)


def _curvature(x: Tensor, full: Tensor) -> Curvature:
    tokens = x.shape[1]
    column, drift = 2 * x @ x.T / tokens, 2 * (full - x) @ x.T / tokens
    return Curvature(column=column[None], tokens=tokens, drift=drift[None])


def _weight(rows: int = 16, width: int = 48) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _single(curvature: Curvature) -> Curvature:
    """Return a curvature in float32, as quantizers get it."""
    drift = None if curvature.drift is None else curvature.drift.float()
    return Curvature(column=curvature.column.float(), tokens=curvature.tokens, drift=drift)


def _values(quantizer: GPTQ | GPTAQ, weight: Tensor, curvature: Curvature) -> Tensor:
    factors = quantizer.prepare(_single(curvature))
    return Integer().dequantize(quantizer.quantize(weight, factors, Integer(), OPTION).weight, OPTION)  # type: ignore


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_keeps_the_contract(alpha: float) -> None:
    quantizer = GPTAQ(alpha=alpha)
    check_quantizer(quantizer)
    assert isinstance(quantizer, DriftQuantizer)
    assert quantizer.needs_drift


@pytest.mark.parametrize("act_order", [False, True])
def test_the_target_is_the_least_squares_solution(act_order: bool) -> None:
    """The damping is ridge regression towards the weight: ``min_V ||W X_f - V X||^2 + tokens d/2 ||W - V||^2``."""
    (x, full), weight = _inputs(), _weight()
    curvature = _curvature(x, full)
    factors = factorize(curvature, Damping(0.02, 1.0, "mean"), act_order)
    ridge = 0.02 * curvature.column[0].diagonal().mean() * x.shape[1] / 2
    left = torch.cat([x, ridge.sqrt() * torch.eye(48, dtype=torch.float64)], dim=1)
    right = torch.cat([weight @ full, ridge.sqrt() * weight], dim=1)
    expected = torch.linalg.lstsq(left.T, right.T).solution.T
    assert curvature.drift is not None
    target = weight + weight @ target_shift(curvature.drift, factors)[0]
    assert torch.allclose(target, expected, rtol=1e-9, atol=1e-9)
    assert (target - weight).norm() > 0.1 * weight.norm(), "else nothing is shown"


def test_the_objective_is_that_of_gptq_around_the_target_but_for_a_constant() -> None:
    (x, full), weight = _inputs(), _weight()
    curvature = _curvature(x, full)
    assert curvature.drift is not None
    target = weight + weight @ target_shift(curvature.drift, factorize(curvature, Damping(0.0, 1.0, "mean"), False))[0]
    constants = []
    for seed in range(3):
        rounded = weight + torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        error = (weight @ full - rounded @ x).square().sum().item() / x.shape[1]
        constants.append(error - curvature.quadratic(target - rounded))
    assert constants == pytest.approx([constants[0]] * 3, rel=1e-9)
    assert constants[0] > 0, "what no weight can make up for"


@pytest.mark.parametrize("act_order", [False, True])
def test_is_nearer_to_the_full_precision_output_than_gptq(act_order: bool) -> None:
    (x, full), weight = _inputs(), _weight()
    errors = [
        (weight @ full - _values(quantizer, weight, _curvature(x, full)).double() @ x).norm()
        for quantizer in (
            GPTAQ(alpha=1.0, act_order=act_order),
            GPTAQ(alpha=0.5, act_order=act_order),
            GPTQ(act_order=act_order),
        )
    ]
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.7 * errors[2]


@pytest.mark.parametrize("given", [True, False])
def test_without_drift_it_is_gptq_to_the_bit(given: bool) -> None:
    (x, _), weight = _inputs(), _weight()
    curvature = _curvature(x, x) if given else Curvature(column=_curvature(x, x).column, tokens=1)
    assert torch.equal(_values(GPTAQ(), weight, curvature), _values(GPTQ(), weight, curvature))


def test_the_grid_covers_the_target() -> None:
    """A target of twice the weight is met by scales that are twice as large."""
    (x, _), weight = _inputs(), _weight()
    factors = GPTAQ(damping=0.0).prepare(_curvature(x, 2 * x))
    assert factors.shift is not None
    assert torch.allclose(factors.shift[0], torch.eye(48, dtype=torch.float64), atol=1e-9)
    whole, half = GPTAQ(alpha=1.0, damping=0.01), GPTQ(damping=0.01)
    quantized = whole.quantize(weight.float(), whole.prepare(_single(_curvature(x, 2 * x))), Integer(), OPTION)
    plain = half.quantize(weight.float(), half.prepare(_single(_curvature(x, x))), Integer(), OPTION)
    scales = [each.weight.parameters["scales"].float() for each in (quantized, plain)]
    assert 1.8 < (scales[0] / scales[1]).median() < 2.2


def test_heads_are_independent() -> None:
    weight = _weight().float()
    both = [_single(_curvature(*_inputs(size=size))) for size in (0.1, 0.5)]
    curvature = Curvature(
        column=torch.cat([each.column for each in both]),
        tokens=1,
        drift=torch.cat([each.drift for each in both if each.drift is not None]),
    )
    together = _values(GPTAQ(), weight, curvature)
    for head, own in enumerate(both):
        rows = slice(8 * head, 8 * head + 8)
        assert torch.allclose(_values(GPTAQ(), weight[rows], own), together[rows], atol=1e-5)


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": 1.1}, {"damping": 2.0}, {"block_size": 0}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(AptqError, match="quantizer"):
        GPTAQ(**options)  # type: ignore[arg-type]
