"""Trellis-coded quantization as a format."""

import pytest
import torch

from aptq.api import AptqError, Option
from aptq.formats.integer import Integer
from aptq.formats.trellis import Trellis
from aptq.quantizers.foem import FOEM
from aptq.quantizers.gptq import GPTQ
from aptq.testing import check_format, check_quantizer


@pytest.mark.parametrize("format", [Trellis(), Trellis(group_size=32, scale_dtype="bfloat16"), Trellis(state_bits=12)])
def test_keeps_the_contract(format: Trellis) -> None:
    check_format(format, bits=(1, 2, 3, 4, 6), group_sizes=(-1, 32))


@pytest.mark.parametrize("quantizer", [GPTQ(), FOEM()])
def test_works_under_quantizers_that_feed_errors_back(quantizer: GPTQ | FOEM) -> None:
    check_quantizer(quantizer, format=Trellis(), bits=(2, 3))


def test_normal_weights_lose_less_than_on_an_integer_grid_of_more_storage() -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    errors, stored = [], []
    for format, option in ((Trellis(), Option(3, -1)), (Integer(), Option(3, 64))):
        grid = format.fit(weight[None], option)
        codes, values = grid.round(weight.T[None], slice(None))
        errors.append(float((values[0].T - weight).square().mean()))
        packed = format.pack(grid.finish(codes), option)
        stored.append(sum(tensor.numel() * tensor.element_size() for tensor in packed.values()))
    assert errors[0] < 0.7 * errors[1]
    assert stored[0] <= stored[1]


def test_rows_of_zeros_stay_zeros() -> None:
    weight = torch.randn(8, 64)
    weight[3] = 0
    format, option = Trellis(), Option(2, -1)
    grid = format.fit(weight[None], option)
    codes, values = grid.round(weight.T[None], slice(None))
    assert not values[0, :, 3].any()
    assert not format.dequantize(grid.finish(codes), option)[3].any()


def test_heads_cannot_be_rounded_by_themselves() -> None:
    with pytest.raises(AptqError, match="heads by themselves.*hessian=input"):
        Trellis().fit(torch.randn(2, 4, 8), Option(2, -1))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"state_bits": 11}, r"state_bits=11 is not allowed; use 10 or 12"),
        ({"scale_dtype": "float8"}, "float16, bfloat16, float32"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(AptqError, match=told):
        Trellis(**options)  # type: ignore[arg-type]


def test_bits_that_there_is_no_code_for_are_refused() -> None:
    with pytest.raises(AptqError, match="1 to 6 bits; got bits=8"):
        Trellis().check(Option(8, -1), (4, 8))
