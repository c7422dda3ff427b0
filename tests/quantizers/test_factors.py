"""The factors of Hessians in float64, against inverses."""

import pytest
import torch
from torch import Tensor

from aptq.api import Curvature
from aptq.quantizers.factors import Damping, factorize, inverse_factor


def _hessian(width: int, heads: int = 1, seed: int = 0, tokens: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(heads, tokens, width, generator=generator) @ torch.randn(heads, width, width, generator=generator)
    return 2 * x.transpose(1, 2) @ x / tokens


@pytest.mark.parametrize("width", [30, 700])
def test_inverse_factor_in_float64(width: int) -> None:
    hessian = _hessian(width, heads=2, tokens=2 * width).double()
    lower, damping, events = inverse_factor(hessian.clone(), Damping(0.01, 1.0, "mean"))
    eye = torch.eye(width, dtype=torch.float64).expand(2, -1, -1)
    damped = hessian + 0.01 * hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * eye
    assert torch.allclose(lower @ damped @ lower.transpose(1, 2), eye, atol=1e-9)
    assert torch.equal(lower, lower.tril())
    assert damping == 0.01
    assert events == ()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scale", ["diagonal", "mean"])
def test_factors_give_the_damped_inverse(act_order: bool, scale: str) -> None:
    hessian = _hessian(40, heads=3).double()
    factors = factorize(Curvature(column=hessian.clone(), tokens=1), Damping(0.05, 1.0, scale), act_order)
    upper = factors.diagonal[:, :, None] * factors.feedback
    for head in range(3):
        order = factors.order[head]
        diagonal = hessian[head].diagonal()
        ridge = 0.05 * (diagonal if scale == "diagonal" else diagonal.mean().expand(40))
        damped = hessian[head] + torch.diag(ridge)
        assert torch.allclose(factors.ridge[head], ridge)
        expected = torch.linalg.inv(damped)[order][:, order]
        assert torch.allclose(upper[head].T @ upper[head], expected, rtol=1e-8, atol=1e-12)
        assert torch.equal(factors.feedback[head], factors.feedback[head].triu())


def test_importance_is_what_an_error_costs_after_compensation() -> None:
    hessian = _hessian(20).double()
    factors = factorize(Curvature(column=hessian.clone(), tokens=1), Damping(0.0, 1.0, "mean"), act_order=True)
    order = factors.order[0].tolist()
    for place, column in enumerate(order):
        later = order[place + 1 :]
        cost = hessian[0, column, column]
        if later:  # the error of this column is 1; the best that later ones can do about it
            cross = hessian[0, later, column]
            cost = cost - cross @ torch.linalg.solve(hessian[0][later][:, later], cross)
        assert factors.importance[0, column].item() == pytest.approx(cost.item(), rel=1e-6)
