"""What codes mean, asked of the formats."""

import pytest
import torch

from aptq.api import Format, Option
from aptq.formats.asymmetric_float import AsymmetricFloat
from aptq.formats.block_clustered import BlockClustered
from aptq.formats.float import Float
from aptq.formats.integer import Integer
from aptq.formats.levels import levels
from aptq.formats.mixed import Mixed
from aptq.formats.scaled import Scaled
from aptq.formats.vector import Vector
from aptq.meaning import Integers, Levels, meaning_of


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_integers_are_found_with_or_without_zeros_whatever_the_groups(bits: int, symmetric: bool) -> None:
    for size in (32, -1):
        meaning = meaning_of(Integer(symmetric=symmetric, scale_dtype="bfloat16"), Option(bits, size))
        assert isinstance(meaning, Integers)
        assert meaning.stored_zeros is not symmetric


@pytest.mark.parametrize("code", ["normal", "fp"])
@pytest.mark.parametrize("format", [Float, AsymmetricFloat])
def test_levels_are_found_and_codes_that_are_none_are_zero(format: type[Float | AsymmetricFloat], code: str) -> None:
    for bits in (3, 4):
        meaning = meaning_of(format(code=code), Option(bits, 64))
        assert isinstance(meaning, Levels)
        assert meaning.two_sided is (format is AsymmetricFloat)
        expected = torch.zeros(1 << bits)
        expected[: len(levels(code, bits))] = torch.tensor(levels(code, bits))
        assert torch.equal(meaning.levels, expected)


@pytest.mark.parametrize(
    "format",
    [
        BlockClustered(),
        Vector(),
        Scaled(inner=Integer()),
        Integer(symmetric=True, scale_dtype="e4m3"),
        Integer(symmetric=True, scale_dtype="e8m0"),
        Float(code="fp", scale_dtype="e4m3"),
    ],
    ids=repr,
)
def test_codes_that_mean_something_else_are_not_taken_for_these(format: Format) -> None:
    assert meaning_of(format, Option(4, 64)) is None


def test_of_several_formats_the_one_that_the_option_names_is_asked() -> None:
    mixed = Mixed(formats={"integer": Integer(), "float": Float()})
    assert isinstance(meaning_of(mixed, Option(3, 64, "integer")), Integers)
    assert isinstance(meaning_of(mixed, Option(3, 64, "float")), Levels)
