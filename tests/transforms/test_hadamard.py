"""Signs and factors: orthogonal for every width, flat, and the same on any machine."""

from dataclasses import dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from aptq.api import AptqError
from aptq.testing import check_transform
from aptq.transforms import hadamard
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 2, 7, 33, 80, 576, 1536])
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_the_kernel_does_what_the_products_do(
    rows: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, rows, width).to(dtype)
    expected = Hadamard(seed=1).apply(x.double())
    found = Hadamard(seed=1).apply(x)
    monkeypatch.setattr(hadamard, "kernels_for", lambda user: None)
    products = Hadamard(seed=1).apply(x)
    monkeypatch.undo()
    eps = torch.finfo(dtype).eps
    for each in (found, products):
        assert (each.double() - expected).abs().max() <= max(eps, 4e-7) * x.double().norm(dim=-1).max()
    assert torch.equal(Hadamard(seed=1).apply(x[1, rows - 1]), found[1, rows - 1]), "each row by itself"


@pytest.mark.parametrize("back", [False, True])
def test_it_is_one_operator_of_a_compiled_graph(back: bool) -> None:
    x = torch.randn(2, 80)
    torch.library.opcheck(torch.ops.aptq.hadamard, (x, 0, back))
    torch.library.opcheck(torch.ops.aptq.hadamard, (x.clone().requires_grad_(), 0, back))
    function = Hadamard().invert if back else Hadamard().apply
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
        for each in (x, torch.randn(5, 80), x[0]):
            assert torch.equal(compiled(each), function(each))


def test_tensors_without_data_have_shapes_and_leave_no_trace() -> None:
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(3, 24))
        found = [Hadamard(seed=9).apply(fake), Hadamard(seed=9).invert(fake)]
    assert all(type(each) is FakeTensor and each.shape == (3, 24) for each in found)
    x = torch.randn(3, 24)
    torch.testing.assert_close(Hadamard(seed=9).invert(Hadamard(seed=9).apply(x)), x)


def test_signs_come_from_a_hash_that_no_release_changes() -> None:
    matrix = Hadamard(seed=0).apply(torch.eye(8, dtype=torch.float64))
    assert (matrix[:, 0] > 0).tolist() == [True, False, True, False, False, True, False, False]
    assert not torch.equal(matrix, Hadamard(seed=1).apply(torch.eye(8, dtype=torch.float64)))


def test_wide_odd_factors_are_refused() -> None:
    with pytest.raises(AptqError, match=r"odd factor 4099.*transform=none"):
        Hadamard().check(4099 * 2)
    Hadamard().check(27648)


@dataclass(frozen=True)
class _Wrong(Hadamard):
    """Breaks one promise."""

    how: str = ""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        turned = super().apply(x)
        if self.how == "orthogonal":
            return turned * 1.01
        if self.how == "in place" and x.dtype == torch.float16:
            x += 1
        return turned.double() if self.how == "dtype" else turned

    def invert(self, x: torch.Tensor) -> torch.Tensor:
        return super().apply(x) if self.how == "inverse" else super().invert(x)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("orthogonal", "T T.*T against the identity"),
        ("inverse", r"invert\(\) against T.T"),
        ("in place", "changed its input"),
        ("dtype", "turns .* into"),
    ],
)
def test_the_check_of_transforms_can_fail(how: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_transform(_Wrong(how=how), widths=[48])
