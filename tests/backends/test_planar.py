from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from aptq.api import Format, Option
from aptq.backends.planar import unreadable
from aptq.formats.block_clustered import BlockClustered
from aptq.formats.integer import Integer
from tests.backends.specs import FORMATS, spec_of

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Extra(Integer):
    """Stored with something that nobody knows."""

    def packed_layout(
        self, option: Option, shape: tuple[int, int]
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        return {**super().packed_layout(option, shape), "secret": ((1,), torch.float32)}


class Cubes(Integer):
    """Stored as integers are, and means something else."""

    def dequantize(self, quantized, option):  # type: ignore[no-untyped-def]
        return super().dequantize(quantized, option) ** 3


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_integers_and_levels_are_read(format: Format) -> None:
    assert unreadable(spec_of(format, Option(3, 64)), FLOATS) is None


@pytest.mark.parametrize(
    ("format", "option", "reason"),
    [
        (Integer(), Option(9, 64), "at most 8 bits, not 9"),
        (Extra(), Option(4, 64), "cannot read secret of format anything, torch.float32 of shape (1,)"),
        (BlockClustered(), Option(4, 64), "cannot read scales of format anything"),
        (Cubes(), Option(4, 64), "neither integers nor levels"),
    ],
)
def test_what_is_not_as_expected_is_named(format: Format, option: Option, reason: str) -> None:
    assert reason in str(unreadable(spec_of(format, option, (64, 128)), FLOATS))


def test_scales_of_a_dtype_that_is_not_taken_are_named() -> None:
    assert "cannot read scales" in str(unreadable(spec_of(FORMATS["float32 scales"], Option(4, 64)), FLOATS[1:]))
