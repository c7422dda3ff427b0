"""Symmetric products, built up in strips."""

import pytest
import torch
from torch import nn

from aptq.hessians.gram import add_gram, drift_between, empty_sum, mirror
from aptq.models.structure import LinearLayer


@pytest.mark.parametrize("width", [3, 256, 300])
def test_batches_add_up_to_the_whole_product(width: int) -> None:
    x = torch.randn(50, width, dtype=torch.float64)
    matrix = torch.zeros(width, width, dtype=torch.float64)
    for rows in x.split(20):
        add_gram(matrix, rows, 2.0)
    mirror(matrix[None])
    assert torch.allclose(matrix, 2 * x.T @ x)
    assert torch.equal(matrix, matrix.T)


def test_drift_is_summed_over_batches_and_its_rows_are_the_differences() -> None:
    x, full = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    drift = drift_between(x.split(4), full.split(4), torch.zeros(7, 7, dtype=torch.float64))
    expected = 2 * torch.einsum("sti,stj->ij", full - x, x)
    assert torch.allclose(drift, expected)


@pytest.mark.parametrize(
    ("stored", "summed"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_sums_are_at_least_in_float32(stored: torch.dtype, summed: torch.dtype) -> None:
    total = empty_sum(LinearLayer("layer", nn.Linear(5, 7, dtype=stored)), heads=2)
    assert total.column.shape == (2, 5, 5)
    assert total.column.dtype == summed
    assert total.tokens == 0
