"""The format by aptq's own conformance checks, its storage, and the way a user chooses it."""

from __future__ import annotations

import pytest
import torch

from aptq.api import AptqError, Option
from aptq.config import compose
from aptq.registry import build
from aptq.testing import check_backend, check_format, check_quantizer
from aptq_ternary.ternary import Ternary


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_keeps_the_promises_of_a_format(scale_dtype: str) -> None:
    check_format(Ternary(scale_dtype=scale_dtype), bits=[2])


@pytest.mark.parametrize("name", ["nearest", "gptq"])
def test_works_under_the_built_in_quantizers(name: str) -> None:
    check_quantizer(build("quantizer", {"name": name}), format=Ternary(), bits=[2])


def test_runs_on_the_reference_backend() -> None:
    check_backend(build("backend", {"name": "reference"}), format=Ternary(), format_name="ternary", bits=[2])


def test_stores_five_codes_in_a_byte() -> None:
    layout = Ternary().packed_layout(Option(bits=2, group_size=128), (64, 640))
    shape, dtype = layout["trits"]
    assert shape == (64, 128)
    assert 8 * dtype.itemsize * 128 / 640 == 1.6


def test_finds_the_scale_of_weights_that_are_ternary() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-1, 2, (1, 4, 64), generator=generator).float() * 0.25
    option = Option(bits=2, group_size=16)
    grid = Ternary().fit(weight, option)
    quantized = grid.finish(grid.round(weight.transpose(1, 2), slice(None))[0])
    assert torch.equal(Ternary().dequantize(quantized, option), weight[0])


def test_refuses_other_widths() -> None:
    with pytest.raises(AptqError, match="2 bits.*bits=3"):
        Ternary().check(Option(bits=3, group_size=64), (8, 64))


def test_is_chosen_by_its_name() -> None:
    config = compose(["format=ternary", "allocator=uniform", "allocator.bits=2", "format.group_size=32"])
    assert build("format", config.format) == Ternary(group_size=32)
