"""The column loop in float64."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from aptq.api import Curvature, Grid, Option, QuantizedWeight
from aptq.quantizers.columns import refine_columns, round_columns, round_weight
from aptq.quantizers.factors import Damping, factorize


def _hessian(width: int, heads: int = 1, seed: int = 0, tokens: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(heads, tokens, width, generator=generator) @ torch.randn(heads, width, width, generator=generator)
    return 2 * x.transpose(1, 2) @ x / tokens


@dataclass(frozen=True)
class _Steps:
    """Even levels without end, of one step for all weights, in the dtype of what is rounded."""

    step: float = 0.25

    def permuted(self, order: Tensor) -> Grid:
        return self

    def round(self, values: Tensor, position: int | slice) -> tuple[Tensor, Tensor]:
        codes = torch.round(values / self.step)
        return codes, codes * self.step

    def finish(self, codes: Tensor) -> QuantizedWeight:
        return QuantizedWeight(codes=codes, parameters={})


def _plain(weight: Tensor, hessian: Tensor, step: float, beta: float) -> Tensor:
    """Return codes ``[rows, in]`` by the formulas of GPTQ and FOEM as they are written, one weight after the other."""
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    codes = torch.zeros_like(weight)
    for row, raw in enumerate(weight):
        w = raw.clone()
        for j in range(len(w)):
            codes[row, j] = torch.round(w[j] / step)
            error = ((w[j] - step * codes[row, j]) - beta * (w[j] - raw[j])) / upper[j, j]
            w[j:] -= error * upper[j, j:]
            if j + 1 < len(w):
                w[j + 1] -= beta * (w[j + 1] - raw[j + 1])
    return codes


@pytest.mark.parametrize("beta", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_the_lazy_loop_is_the_plain_one(beta: float, block_size: int) -> None:
    hessian, weight = _hessian(40, heads=2).double(), torch.randn(2, 6, 40, dtype=torch.float64)
    factors = factorize(Curvature(column=hessian, tokens=1), Damping(0.01, 1.0, "mean"), act_order=False)
    columns = weight.transpose(1, 2).contiguous()
    codes = round_columns(columns, factors.feedback, _Steps(), block_size, beta)
    for head in range(2):
        damped = hessian[head] + 0.01 * hessian[head].diagonal().mean() * torch.eye(40, dtype=torch.float64)
        assert torch.equal(codes[head].T, _plain(weight[head], damped, 0.25, beta))


def _coordinate_descent(values: Tensor, target: Tensor, hessian: Tensor, step: float, passes: int) -> Tensor:
    """Return values ``[in, rows]``: each column moved to the best level, found by trying all that are near."""
    values = values.clone()
    for _ in range(passes):
        for j in range(len(values)):
            for row in range(values.shape[1]):
                tried = []
                for level in step * (torch.round(values[j, row] / step) + torch.arange(-8.0, 9.0)):
                    values[j, row] = level
                    error = target[:, row] - values[:, row]
                    tried.append((float(error @ hessian @ error), float(level)))
                values[j, row] = min(tried)[1]
    return values


@pytest.mark.parametrize("block_size", [1, 5, 64])
@pytest.mark.parametrize("passes", [1, 2])
def test_refinement_is_coordinate_descent(block_size: int, passes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hessian = _hessian(12, heads=2).double()
    target = torch.randn(2, 12, 3, generator=generator, dtype=torch.float64)
    grid = _Steps(0.25)
    start = grid.round(target + 0.2 * torch.randn(target.shape, generator=generator), slice(None))[1]
    values = start.clone()
    codes = refine_columns(values, target, hessian, grid, block_size, passes)
    assert torch.equal(codes * grid.step, values)
    for head in range(2):
        assert torch.allclose(values[head], _coordinate_descent(start[head], target[head], hessian[head], 0.25, passes))

    def objective(candidate: Tensor) -> float:
        return float(torch.einsum("hir,hij,hjr->", target - candidate, hessian, target - candidate))

    assert objective(values) < objective(start)


@dataclass(frozen=True)
class _Learner(_Steps):
    """A grid that notes what it met, and takes another step for each run."""

    steps: tuple[float, ...] = ()
    seen: list[Tensor] = field(default_factory=list)

    def refit(self, columns: Tensor) -> Grid | None:
        self.seen.append(columns)
        if not self.steps:
            return None
        return _Learner(step=self.steps[0], steps=self.steps[1:], seen=self.seen)


@pytest.mark.parametrize(("steps", "best"), [((0.1, 0.4), 0.1), ((0.8, 0.1), 0.1), ((0.8, 1.6), 0.4)])
def test_a_grid_that_learns_gets_more_runs_and_the_best_one_is_kept(steps: tuple[float, ...], best: float) -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    grid = _Learner(step=0.4, steps=steps, seen=[])
    fits: list[Grid] = []

    class _Fits:
        def fit(self, weight: Tensor, option: Option, importance: Tensor | None = None) -> Grid:
            fits.append(grid)
            return grid

    factors = factorize(Curvature(column=_hessian(20), tokens=1), Damping(0.01, 1.0, "mean"), act_order=True)
    rounded = round_weight(weight, factors, _Fits(), Option(4, -1), block_size=8)  # type: ignore[arg-type]
    assert isinstance(rounded.grid, _Learner)
    assert rounded.grid.step == best
    assert len(fits) == 1
    met = grid.seen
    assert len(met) == 1 + len(steps)
    first = int(factors.order[0, 0])  # nothing has moved the column that is rounded first, whatever the grid
    for columns in met:
        assert torch.equal(columns[0, first], weight[:, first])
        assert not torch.equal(columns[0], weight.T)
