"""Signs and factors: orthogonal for every width, flat, and the same on any machine."""

import pytest
import torch

from aptq.api import AptqError
from aptq.testing import check_transform
from aptq.transforms.hadamard import Hadamard, factor_sizes


@pytest.mark.parametrize("width", [1, 2, 9, 33, 48, 64, 96, 576, 1536, 4096, 11008])
def test_it_keeps_the_promises_of_a_transform(width: int) -> None:
    if width < 4096:
        check_transform(Hadamard(seed=3), widths=[width])
    x = torch.randn(2, width, dtype=torch.float64)
    transform = Hadamard()
    torch.testing.assert_close(transform.invert(transform.apply(x)), x)
    torch.testing.assert_close(transform.apply(x).square().sum(-1), x.square().sum(-1))


@pytest.mark.parametrize(
    ("width", "sizes"),
    [
        (1, [1]),
        (9, [9]),
        (64, [64]),
        (128, [8, 16]),
        (576, [36, 16]),
        (4096, [64, 64]),
        (14336, [56, 16, 16]),
        (134, [67, 2]),
    ],
)
def test_factors_are_small(width: int, sizes: list[int]) -> None:
    assert list(factor_sizes(width)) == sizes


@pytest.mark.parametrize("width", [64, 576, 1536])
def test_one_large_input_is_spread_over_all(width: int) -> None:
    x = torch.zeros(width)
    x[5] = 1.0
    odd = width // (width & -width)
    assert Hadamard().apply(x).abs().max() <= (2.0 / width if odd > 1 else 1.0 / width) ** 0.5 + 1e-6


def test_factors_are_those_of_one_matrix() -> None:
    """The dense Kronecker product of Hartley's and Hadamard's matrix, however it is cut into factors."""
    size = torch.arange(3, dtype=torch.float64)
    angles = 2 * torch.pi / 3 * torch.outer(size, size)
    dense = (angles.cos() + angles.sin()) / 3**0.5
    for _ in range(7):
        dense = torch.kron(dense, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5)
    identity = torch.eye(384, dtype=torch.float64)
    found = Hadamard().invert(identity)
    torch.testing.assert_close(found.abs(), dense.abs())
    assert len(factor_sizes(384)) == 2
    assert bool(((found / dense).round() == (found / dense).round()[0]).all()), "columns have the signs"


def test_signs_come_from_a_hash_that_no_release_changes() -> None:
    matrix = Hadamard(seed=0).apply(torch.eye(8, dtype=torch.float64))
    assert (matrix[:, 0] > 0).tolist() == [True, False, True, False, False, True, False, False]
    assert not torch.equal(matrix, Hadamard(seed=1).apply(torch.eye(8, dtype=torch.float64)))


def test_wide_odd_factors_are_refused() -> None:
    with pytest.raises(AptqError, match=r"odd factor 4099.*transform=none"):
        Hadamard().check(4099 * 2)
    Hadamard().check(27648)
