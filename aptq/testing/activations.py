"""Does a quantizer of activations keep its promises: each token by itself, nothing changed, nothing remembered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aptq.api import ActivationQuantizer
from aptq.testing.assertions import accepted_widths, expect, expect_equal

__all__ = ["check_activation"]


def check_activation(
    activation: ActivationQuantizer,
    *,
    widths: Sequence[int] = (64, 96, 33, 1),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
) -> None:
    """Check a quantizer of activations on every width that it accepts; one must be among them.

    Raises:
        AssertionError: a promise of ``aptq.api.ActivationQuantizer`` is broken.
    """
    for width in accepted_widths(activation.check, widths):
        for dtype in dtypes:
            _check_case(activation, _inputs(width).to(dtype), f"{width} inputs in {dtype}")
        _check_gradient(activation, _inputs(width), f"{width} inputs")


def _inputs(width: int) -> Tensor:
    """Return tokens ``[2, 5, width]`` of different size, one with an outlier and one of zeros."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2, 5, width, generator=generator) * torch.tensor([0.01, 1.0, 3.0, 50.0, 1.0])[:, None]
    x[0, 1, 0] = 100.0
    x[1, 4] = 0.0
    return x


def _check_case(activation: ActivationQuantizer, x: Tensor, case: str) -> None:
    before = x.clone()
    found = activation.quantize(x)
    expect_equal(x, before, f"{case}: quantize() changed its input")
    expect(
        found.shape == x.shape and found.dtype == x.dtype,
        f"{case}: quantize() turns {tuple(x.shape)} {x.dtype} into {tuple(found.shape)} {found.dtype}.",
    )
    error = (found.double() - x.double()).square().sum(-1)
    expect(
        bool((error <= x.double().square().sum(-1)).all()),
        f"{case}: a token loses more than if it were replaced by zeros.",
    )
    expect_equal(activation.quantize(x), found, f"{case}: quantize() a second time")
    for place in ((0, 0), (0, 1), (1, 3), (1, 4)):
        alone = activation.quantize(x[place])
        expect_equal(alone, found[place], f"{case}: token {place} alone and among others")
    expect_equal(activation.quantize(x[:0]), found[:0], f"{case}: no tokens at all")
    broken = x.clone()
    broken[0, 0, 0] = float("nan")
    spoilt = activation.quantize(broken)
    expect(not bool(spoilt[0, 0].isfinite().all()), f"{case}: NaN goes in and none comes out.")
    expect_equal(spoilt[1], found[1], f"{case}: tokens beside one with NaN")


def _check_gradient(activation: ActivationQuantizer, x: Tensor, case: str) -> None:
    """See that gradients go straight through."""
    given = x.clone().requires_grad_()
    direction = torch.linspace(-1.0, 1.0, x.shape[-1])
    with torch.enable_grad():
        (activation.quantize(given) * direction).sum().backward()
    expect(given.grad is not None, f"{case}: no gradient comes through quantize().")
    assert given.grad is not None
    expect_equal(given.grad, direction.expand_as(x), f"{case}: the gradient through quantize()")
