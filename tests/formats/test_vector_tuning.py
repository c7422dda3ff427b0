from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aptq.api import Curvature, Option, QuantizedWeight
from aptq.formats.codebooks import Codebook
from aptq.formats.vector import Vector
from aptq.formats.vector_tuning import Lookup, Tuned, conjugate_gradients, spread, tune
from aptq.quantizers.gptq import GPTQ

HEADS, INPUTS, ROWS, LENGTH = 2, 6, 10, 4  # the last vector of a column is half as long


def problem(residual: bool = True) -> tuple[list[Codebook], Tensor, Lookup, Tuned, Tensor, Tensor]:
    """Return codebooks for two groups of columns, whose column has which, look-ups, tables and scales, T and H."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    vectors = -(-ROWS // LENGTH)
    books = [Codebook(normal(4, LENGTH), normal(2, LENGTH) / 4 if residual else None) for _ in range(2)]
    books.append(Codebook(normal(4, 2)))  # of vectors half as long: two of them a code
    book = torch.tensor([0, 0, 1, 1, 0, 2])
    most = torch.tensor([8 if residual else 4, 8 if residual else 4, 16])
    codes = (torch.rand(HEADS, INPUTS, vectors, generator=draw) * most[book][:, None]).long()
    tables = [table.flatten() for each in books for table in (each.main, each.residual) if table is not None]
    begin = Tuned(torch.cat(tables), 1 + normal(INPUTS) / 8, 1 + normal(HEADS, vectors) / 8)
    root = normal(HEADS, INPUTS, INPUTS)
    return books, codes, Lookup.of(books, book, codes, LENGTH), begin, normal(HEADS, INPUTS, ROWS), root @ root.mT


def loss(state: Tuned, lookup: Lookup, target: Tensor, hessian: Tensor) -> Tensor:
    left = target - state.values(lookup, LENGTH)[..., :ROWS]
    return (left * (hessian @ left)).sum()


def test_values_are_the_entries_that_codes_name() -> None:
    books, codes, lookup, begin, _, _ = problem()
    values = begin.values(lookup, LENGTH) / spread(begin.columns, begin.vectors, LENGTH)
    first, second = books[0], books[2]
    assert second.main is not None
    for head in range(HEADS):
        code = int(codes[head, 0, 1])
        assert first.residual is not None
        expected = first.main[code % 4] + first.residual[code // 4]
        torch.testing.assert_close(values[head, 0, LENGTH : 2 * LENGTH], expected)
        code = int(codes[head, 5, 0])
        torch.testing.assert_close(values[head, 5, :LENGTH], torch.cat([second.main[code % 4], second.main[code // 4]]))


def test_gathering_is_the_transpose_of_looking_up() -> None:
    _, _, lookup, begin, _, _ = problem()
    shape = HEADS, INPUTS, 12
    other = torch.randn(shape, dtype=torch.float64)
    left, right = (lookup.values(begin.flat, shape) * other).sum(), begin.flat @ lookup.gathered(other)
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize("residual", [False, True])
def test_tables_become_those_of_dense_least_squares(residual: bool) -> None:
    _, _, lookup, begin, target, hessian = problem(residual)
    by = spread(begin.columns, begin.vectors, LENGTH)[..., :ROWS]
    unit = torch.eye(len(begin.flat), dtype=torch.float64)
    matrix = torch.stack([(lookup.values(each, (HEADS, INPUTS, 12))[..., :ROWS] * by).flatten() for each in unit], 1)
    whole = torch.block_diag(*[torch.kron(head, torch.eye(ROWS, dtype=torch.float64)) for head in hessian])
    solution = torch.linalg.lstsq(matrix.T @ whole @ matrix, matrix.T @ whole @ target.flatten(), driver="gelsd")
    best = loss(Tuned(solution.solution, begin.columns, begin.vectors), lookup, target, hessian)
    found = begin
    for _ in range(40):
        found = tune(found, lookup, target, hessian, LENGTH, 1, ())
    torch.testing.assert_close(loss(found, lookup, target, hessian), best, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scales", [("row_scales",), ("column_scales",)])
def test_scales_are_at_their_optimum(scales: tuple[str, ...]) -> None:
    """The gradient of the loss by autograd is 0 there."""
    _, _, lookup, begin, target, hessian = problem()
    found = tune(begin, lookup, target, hessian, LENGTH, 1, scales)
    after = Tuned(begin.flat, found.columns.clone().requires_grad_(), found.vectors.clone().requires_grad_())
    own = after.vectors if scales == ("row_scales",) else after.columns
    (gradient,) = torch.autograd.grad(loss(after, lookup, target, hessian), own)
    assert gradient.abs().max() <= 1e-4 * hessian.abs().max()


def test_no_round_raises_the_loss() -> None:
    _, _, lookup, begin, target, hessian = problem()
    losses = [
        float(loss(tune(begin, lookup, target, hessian, LENGTH, rounds, ("column_scales", "row_scales")), *rest))
        for rounds in range(5)
        for rest in [(lookup, target, hessian)]
    ]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in zip(losses, losses[1:], strict=False))
    assert losses[-1] < 0.8 * losses[0]


def test_conjugate_gradients_leave_what_nothing_depends_on() -> None:
    matrix = torch.diag(torch.tensor([2.0, 3.0, 0.0]))
    found = conjugate_gradients(lambda x: matrix @ x, torch.tensor([2.0, 6.0, 0.0]), torch.ones(3), matrix.diag(), 5)
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 1.0]))


@pytest.mark.parametrize("format", [Vector(), Vector(outliers=0.1, normalize="columns"), Vector(bits_2="v3-k64-8")])
def test_a_layer_loses_less_and_its_codes_stay(format: Vector) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 32, generator=draw)
    inputs = torch.randn(200, 32, generator=draw) @ torch.randn(32, 32, generator=draw)
    curvature = Curvature(column=(inputs.T @ inputs)[None], tokens=200)

    def rounded(finetune: int) -> tuple[QuantizedWeight, float]:
        tuned = Vector(**{**vars(format), "finetune": finetune, "refits": 0})
        quantizer = GPTQ(damping=0.0)
        found = quantizer.quantize(weight, quantizer.prepare(curvature), tuned, Option(2, -1)).weight
        error = (weight - tuned.dequantize(found, Option(2, -1))) @ inputs.T
        return found, float(error.square().sum())

    (before, most), (after, least) = rounded(0), rounded(3)
    assert torch.equal(before.codes, after.codes)
    assert least < 0.95 * most
