"""Two-sided rounding against the sequential double loop, in float64."""

import pytest
import torch
from torch import Tensor

from aptq.api import AptqError, Curvature, Option
from aptq.formats.integer import Integer
from aptq.quantizers.factors import Damping, inverse_factor
from aptq.quantizers.gptq import GPTQ
from aptq.quantizers.two_sided import TwoSided, round_both_ways
from aptq.testing import check_quantizer


def _positive(size: int, heads: int, seed: int, rank: int | None = None) -> Tensor:
    generator, rank = torch.Generator().manual_seed(seed), rank or 3 * size
    root = torch.randn(heads, size, rank, generator=generator, dtype=torch.float64)
    return root @ root.mT / rank + 0.05 * torch.eye(size, dtype=torch.float64)


def _unit_factor(hessian: Tensor) -> Tensor:
    """Return upper triangular ``U`` with unit diagonal and ``U^T D U = H^-1``."""
    lower, _, _ = inverse_factor(hessian.flip(1, 2), Damping(0.0, 1.0, "mean"))
    return (lower / lower.diagonal(dim1=1, dim2=2)[:, :, None]).flip(1, 2)


def test_keeps_the_contract() -> None:
    check_quantizer(TwoSided())


def _double_loop(weight: Tensor, row: Tensor, column: Tensor, option: Option, format: Integer) -> Tensor:
    """Rows one after the other, and in each its columns: each rounding moves all that is still free to its optimum.

    The optimum is solved for with the dense ``R (x) C``, not with factors.
    """
    rows, width = weight.shape
    grid = format.fit(weight[None], option)
    dense = torch.kron(row, column)
    left = list(range(rows * width))
    free, result = weight.flatten().clone(), torch.zeros(rows * width, dtype=torch.float64)
    for entry in range(rows * width):
        row, column_ = torch.tensor([[entry // width]]), torch.tensor([[entry % width]])
        result[entry] = grid.round_entries(free[entry].view(1, 1), row, column_)[1]
        left.remove(entry)
        if left:
            change = torch.linalg.solve(dense[left][:, left], dense[left, entry])
            free[left] -= change * (result[entry] - free[entry])
    return result.view(rows, width)


@pytest.mark.parametrize("block_size", [1, 5, 12, 64])
def test_equals_the_sequential_double_loop(block_size: int) -> None:
    weight = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    row, column = _positive(5, 2, 0), _positive(12, 2, 1)
    option, format = Option(3, 4), Integer(clip_steps=0)
    grid = format.fit(weight, option)
    natural = torch.arange(5).expand(2, -1)
    codes = round_both_ways(weight.clone(), _unit_factor(row), natural, _unit_factor(column), grid, block_size)
    values = format.dequantize(grid.finish(codes.mT), option)
    for head in range(2):
        expected = _double_loop(weight[head], row[head], column[head], option, format)
        assert torch.allclose(values[5 * head : 5 * head + 5].double(), expected, atol=1e-6)


@pytest.mark.parametrize("rows", [3, 40])
def test_rows_that_do_not_matter_to_each_other_give_gptq(rows: int) -> None:
    weight = torch.randn(2 * rows, 24, generator=torch.Generator().manual_seed(3))
    column, option, format = _positive(24, 2, 4).float(), Option(3, 8), Integer()
    plain = Curvature(column=column, tokens=1)
    even = Curvature(column=column, row=7 * torch.eye(rows).expand(2, -1, -1), tokens=1)
    gptq, both = GPTQ(refine=0), TwoSided(block_size=10)
    expected = gptq.quantize(weight, gptq.prepare(plain), format, option)
    for curvature in (plain, even):
        found = both.quantize(weight, both.prepare(curvature), format, option)
        flips = (found.weight.codes != expected.weight.codes).double().mean().item()
        assert flips < 0.01, "more than ties in float32"
        assert torch.equal(found.weight.parameters["scales"], expected.weight.parameters["scales"])


def test_beats_gptq_on_the_two_sided_objective() -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(5))
    column, row = _positive(64, 3, 6), _positive(32, 3, 7, rank=8)
    curvature = Curvature(column=column.float(), row=row.float(), tokens=1)
    option, format = Option(2, 32), Integer()
    errors = {}
    for name, quantizer in {"columns": GPTQ(), "both": TwoSided()}.items():
        rounded = quantizer.quantize(weight, quantizer.prepare(curvature), format, option)  # type: ignore[arg-type]
        errors[name] = curvature.quadratic(weight - format.dequantize(rounded.weight, option))
    assert errors["both"] < 0.8 * errors["columns"]


def test_damping_of_the_rows_is_reported() -> None:
    row = _positive(4, 1, 8).float()
    row[0, 0, 0] = -1.0
    factors = TwoSided(row_damping=0.0).prepare(Curvature(column=_positive(6, 1, 9).float(), row=row, tokens=1))
    assert factors.events == ()  # a row without curvature counts as one of unit curvature
    row[0, 0, 0] = 1e-3
    factors = TwoSided(row_damping=0.0).prepare(Curvature(column=_positive(6, 1, 9).float(), row=row, tokens=1))
    assert factors.events[0].startswith("rows: damping raised")


@pytest.mark.parametrize("options", [{"row_damping": -1.0}, {"row_damping": 2.0}, {"damping": 2.0}, {"block_size": 0}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(AptqError, match=f"quantizer.{next(iter(options))}"):
        TwoSided(**options)  # type: ignore[arg-type]
