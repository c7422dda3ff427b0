from __future__ import annotations

import gc

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from aptq.backends.cpu import Cpu
from aptq.kernels.cpu import load_kernels, ops
from aptq.kernels.operators import Bound, binds, plain

FOLDER = Cpu().cache_dir
OPERATOR = torch.ops.aptq.cpu_matmul.default


def weight(seed: int) -> tuple[object, ...]:
    """Return the arguments of a product of 64 inputs and 96 outputs behind its input."""
    load_kernels("native", FOLDER)
    generator = torch.Generator().manual_seed(seed)
    qweight = torch.randint(-(2**31), 2**31 - 1, (2, 4, 96), generator=generator, dtype=torch.int32)
    scales = torch.rand(1, 96, generator=generator).half()
    return qweight, scales, None, None, None, None, None, 64, False, "native", FOLDER


@pytest.mark.parametrize("shape", [(1, 64), (2, 3, 64), (40, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bound_products_are_those_of_the_operator(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weights, x = [weight(0), weight(1)], torch.randn(shape).to(dtype)
    for some in (weights, weights[:1], [weights[0], (*weights[1][:8], True, *weights[1][9:])]):
        bound = Bound(OPERATOR, some, x)
        y = torch.ops.aptq.bound(x, bound.number, 96 * len(some))
        assert torch.equal(y, torch.cat([ops.cpu_matmul(x, *each) for each in some], -1))
        torch.library.opcheck(torch.ops.aptq.bound.default, (x, bound.number, 96 * len(some)))


def test_bound_products_are_found_while_somebody_holds_them() -> None:
    x = torch.ones(1, 64)
    bound = Bound(OPERATOR, [weight(0)], x)
    number = bound.number
    torch.ops.aptq.bound(x, number, 96)
    del bound
    gc.collect()
    with pytest.raises(KeyError):
        torch.ops.aptq.bound(x, number, 96)


def test_only_products_bind() -> None:
    assert binds(OPERATOR)
    assert not binds(torch.ops.aten.mm.default)


def test_what_is_traced_meets_the_operator() -> None:
    x = torch.ones(1, 64)
    assert plain(x)
    seen = []
    make_fx(lambda each: seen.append(plain(each)) or each + 1)(x)
    assert seen == [False]
