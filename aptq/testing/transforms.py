"""Does a transform keep its promises: orthogonal, the same for equal options, each row by itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from aptq.api import Transform
from aptq.testing.assertions import accepted_widths, expect, expect_equal

__all__ = ["check_transform"]

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def check_transform(transform: Transform, *, widths: Sequence[int] = (64, 96, 33, 1)) -> None:
    """Check a transform on every width that it accepts; one must be among them.

    Raises:
        AssertionError: a promise of ``aptq.api.Transform`` is broken.
    """
    for width in accepted_widths(transform.check, widths):
        _check_orthogonal(transform, width)
        for dtype in _TOLERANCE:
            _check_rows(transform, _random(2, 5, width).to(dtype), f"{width} inputs in {dtype}")
        _check_gradient(transform, width)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(shape[-1]))


def _check_orthogonal(transform: Transform, width: int) -> None:
    """See that ``T`` is orthogonal, that ``invert`` is its inverse, and that a copy of the transform has the same."""
    identity = torch.eye(width, dtype=torch.float64)
    matrix = transform.apply(identity)
    _expect_close(matrix @ matrix.T, identity, f"{width} inputs: T T^T against the identity")
    _expect_close(transform.invert(identity), matrix.T, f"{width} inputs: invert() against T^T")
    expect_equal(copy.deepcopy(transform).apply(identity), matrix, f"{width} inputs: T of a copy")


def _check_rows(transform: Transform, x: Tensor, case: str) -> None:
    before, tolerance = x.clone(), _TOLERANCE[x.dtype]
    found = transform.apply(x)
    expect_equal(x, before, f"{case}: apply() changed its input")
    for name, result in {"apply": found, "invert": transform.invert(x)}.items():
        expect(
            result.shape == x.shape and result.dtype == x.dtype,
            f"{case}: {name}() turns {tuple(x.shape)} {x.dtype} into {tuple(result.shape)} {result.dtype}.",
        )
    expected = x.double() @ transform.apply(torch.eye(x.shape[-1], dtype=torch.float64))
    _expect_close(found.double(), expected, f"{case}: apply() against x T", tolerance)
    _expect_close(transform.apply(x[1, 2]).double(), expected[1, 2], f"{case}: a row alone", tolerance)
    _expect_close(transform.invert(found).double(), x.double(), f"{case}: invert() of apply()", 2 * tolerance)
    expect(transform.apply(x[:0]).shape == x[:0].shape, f"{case}: no rows at all")


def _check_gradient(transform: Transform, width: int) -> None:
    x, direction = _random(2, 3, width)
    x = x.clone().requires_grad_()
    (transform.apply(x) * direction).sum().backward()
    expect(x.grad is not None, f"{width} inputs: apply() passes no gradient")
    _expect_close(x.grad, transform.invert(direction), f"{width} inputs: the gradient of apply()")


def _expect_close(found: Tensor, expected: Tensor, case: str, tolerance: float = 1e-12) -> None:
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    difference = float((found - expected).abs().max()) if expected.numel() else 0.0
    expect(difference <= tolerance * max(largest, 1.0), f"{case}: they differ by {difference:.2g}.")
