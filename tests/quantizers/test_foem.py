"""FOEM: GPTQ with columns that are drawn back. The loop itself is held against the formula in ``test_columns.py``."""

import pytest
import torch
from torch import Tensor

from aptq.api import AptqError, Curvature, Option
from aptq.formats.integer import Integer
from aptq.quantizers.foem import FOEM
from aptq.quantizers.gptq import GPTQ
from aptq.testing import check_quantizer

OPTION = Option(3, 32)


def _curvature(width: int = 96, heads: int = 2) -> Curvature:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(heads, 4 * width, width, generator=generator)
    x = x @ torch.randn(heads, width, width, generator=generator)
    return Curvature(column=2 * x.transpose(1, 2) @ x / (4 * width), tokens=4 * width)


def _weight(rows: int = 12, width: int = 96) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


def _codes(quantizer: FOEM | GPTQ, weight: Tensor, curvature: Curvature) -> Tensor:
    return quantizer.quantize(weight, quantizer.prepare(curvature), Integer(), OPTION).weight.codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_keeps_the_contract(beta: float, act_order: bool) -> None:
    check_quantizer(FOEM(beta=beta, act_order=act_order))


@pytest.mark.parametrize("act_order", [False, True])
def test_without_a_pull_it_is_gptq_to_the_bit(act_order: bool) -> None:
    weight, curvature = _weight(), _curvature()
    expected = _codes(GPTQ(act_order=act_order, refine=0), weight, curvature)
    assert torch.equal(_codes(FOEM(beta=0.0, act_order=act_order), weight, curvature), expected)
    assert not torch.equal(_codes(FOEM(act_order=act_order), weight, curvature), expected)


def test_the_size_of_lazy_blocks_does_not_matter() -> None:
    """The published code forgets the first column of each block."""
    weight, curvature = _weight(), _curvature()
    codes = [_codes(FOEM(block_size=size), weight, curvature) for size in (1, 32, 96)]
    for other in codes[1:]:
        assert (other != codes[0]).double().mean() < 0.02, "more codes differ than the order of float32 sums explains"


def test_drawn_back_all_the_way_it_rounds_to_nearest() -> None:
    weight, curvature = _weight(), _curvature()
    quantizer, format = FOEM(beta=1.0), Integer()
    rounded = quantizer.quantize(weight, quantizer.prepare(curvature), format, OPTION)
    columns = weight.reshape(2, 6, 96).transpose(1, 2)
    nearest = rounded.grid.finish(rounded.grid.round(columns, slice(None))[0])
    assert torch.equal(rounded.weight.codes, nearest.codes)


def test_heads_are_independent() -> None:
    weight, curvature = _weight(), _curvature()
    together = _codes(FOEM(), weight, curvature)
    for head in range(2):
        rows = slice(6 * head, 6 * head + 6)
        alone = Curvature(column=curvature.column[head : head + 1], tokens=curvature.tokens)
        assert torch.equal(_codes(FOEM(), weight[rows], alone), together[rows])


@pytest.mark.parametrize("options", [{"beta": -0.1}, {"beta": 1.1}, {"damping": 2.0}, {"block_size": 0}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(AptqError, match="quantizer"):
        FOEM(**options)  # type: ignore[arg-type]
