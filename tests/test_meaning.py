"""What codes mean, asked of the formats."""

from collections.abc import Sequence

import pytest
import torch

from aptq import packing
from aptq.api import Format, Option, QuantizedWeight
from aptq.formats.asymmetric_float import AsymmetricFloat
from aptq.formats.block_clustered import BlockClustered
from aptq.formats.block_clusters import TOP
from aptq.formats.float import Float
from aptq.formats.integer import Integer
from aptq.formats.levels import levels
from aptq.formats.mixed import Mixed
from aptq.formats.scaled import Scaled
from aptq.formats.scales import read_scales
from aptq.formats.trellis import Trellis
from aptq.formats.trellis_code import BITS, STATE_BITS, values_of_states
from aptq.formats.vector import Vector
from aptq.meaning import Blocks, Integers, Levels, States, Vectors, codebooks_of, meaning_of
from tests.formats.blocks import random_books


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


@pytest.mark.parametrize("state_bits", STATE_BITS)
@pytest.mark.parametrize("bits", BITS)
def test_values_of_states_are_found(bits: int, state_bits: int) -> None:
    meaning = meaning_of(Trellis(group_size=64, state_bits=state_bits), Option(bits, 64))
    assert isinstance(meaning, States)
    assert meaning.bits == state_bits
    assert torch.equal(meaning.values, values_of_states(bits, state_bits))


class Reversed(Trellis):
    """States of the codes of the outputs behind, not before."""

    def dequantize(self, quantized, option):  # type: ignore[no-untyped-def]
        codes = QuantizedWeight(codes=quantized.codes.flip(0), parameters=quantized.parameters)
        return super().dequantize(codes, option).flip(0)


class Older(Trellis):
    """Values that depend on a code three outputs ago too, beyond any state that is recognized."""

    def dequantize(self, quantized, option):  # type: ignore[no-untyped-def]
        values = super().dequantize(quantized, option)
        return torch.cat([values[:3], values[3:] * torch.where(quantized.codes[:-3] > 3, -1.0, 1.0)])


@pytest.mark.parametrize("format", [Reversed(), Older()], ids=repr)
def test_runs_that_are_no_states_are_not_taken_for_them(format: Format) -> None:
    assert meaning_of(format, Option(4, -1)) is None


def test_what_was_found_is_remembered_for_equal_formats_and_not_for_others() -> None:
    first, again = (meaning_of(Trellis(), Option(3, size)) for size in (64, -1))
    assert first is again
    assert meaning_of(Trellis(state_bits=12), Option(3, 64)) is not first
    mixed = Mixed(formats={"trellis": Trellis(), "integer": Integer()})  # holds a dict, and has no hash
    assert isinstance(meaning_of(mixed, Option(3, 64, "trellis")), States)


@pytest.mark.parametrize(
    ("format", "bits", "expected"),
    [
        (Float(code="fp", scale_dtype="e4m3"), 4, levels("fp", 4, own_size=True)),
        (Float(code="fp", scale_dtype="e8m0"), 4, levels("fp", 4, own_size=True)),
        (Float(scale_dtype="e4m3"), 3, levels("normal", 3)),
        (Integer(symmetric=True, scale_dtype="e4m3"), 3, range(-4, 4)),
    ],
    ids=repr,
)
def test_levels_whose_scales_are_bytes(format: Format, bits: int, expected: Sequence[float]) -> None:
    meaning = meaning_of(format, Option(bits, 64))
    assert isinstance(meaning, Levels)
    assert meaning.scale_values is not None
    scale_dtype: str = format.scale_dtype  # type: ignore[attr-defined]
    unit = torch.tensor([0.37 if scale_dtype == "e4m3" else 1.0])
    exact = read_scales({"scales": torch.arange(20, 60).byte()[None], "scale_unit": unit}, scale_dtype)[0].double()
    found = meaning.scale_values[20:60, None].double() * meaning.levels.double() * unit.double()
    values = exact[:, None] * torch.tensor(list(expected)).double()
    torch.testing.assert_close(found[:, : values.shape[1]], values, rtol=1e-7, atol=0)


@pytest.mark.parametrize("scale_dtype", ["e4m3", "bfloat16"])
@pytest.mark.parametrize(("block_size", "count"), [(8, 8), (24, 2), (3, 16)])
def test_codebooks_of_blocks(block_size: int, count: int, scale_dtype: str) -> None:
    format = BlockClustered(block_size=block_size, num_codebooks=count, scale_dtype=scale_dtype)
    for bits in (2, 4):
        option = Option(bits, 2 * block_size)
        meaning = meaning_of(format, option)
        assert isinstance(meaning, Blocks)
        assert (meaning.block_size, meaning.count) == (block_size, count)
        assert (meaning.scale_values is None) is (scale_dtype == "bfloat16")
        books = random_books(count, 1 << bits, seed=bits)
        stored = packing.pack(books.reshape(1, -1).int() + TOP, 6)
        found = codebooks_of(meaning, format, option, stored)
        torch.testing.assert_close(found / found.abs().max(), (books / books.abs().max()).float())


def test_one_codebook_needs_no_selectors() -> None:
    meaning = meaning_of(BlockClustered(num_codebooks=1), Option(4, 64))
    assert isinstance(meaning, Blocks)
    assert (meaning.count, meaning.selector_bits) == (1, 0)


def test_vectors() -> None:
    for bits, length, residual_bits in ((1, 8, 0), (3, 4, 6)):
        for normalize in ("both", "none"):
            meaning = meaning_of(Vector(normalize=normalize, scale_dtype="bfloat16"), Option(bits, 64))
            assert isinstance(meaning, Vectors)
            assert meaning.length == length
            assert meaning.residual_bits == residual_bits


class Doubled(BlockClustered):
    """Blocks of which each takes the codebook of the one before."""

    def dequantize(self, quantized, option):  # type: ignore[no-untyped-def]
        moved = {**quantized.parameters, "selectors": quantized.parameters["selectors"].roll(1, 0)}
        return super().dequantize(QuantizedWeight(codes=quantized.codes, parameters=moved), option)


class Rolled(Vector):
    """Vectors whose rows have the scale of the vector behind."""

    def dequantize(self, quantized, option):  # type: ignore[no-untyped-def]
        moved = {**quantized.parameters, "row_scales": quantized.parameters["row_scales"].roll(1, 0)}
        return super().dequantize(QuantizedWeight(codes=quantized.codes, parameters=moved), option)


class Offset(Integer):
    """Values that are no product of a level and a scale."""

    def dequantize(self, quantized, option):  # type: ignore[no-untyped-def]
        return super().dequantize(quantized, option) + 1


@pytest.mark.parametrize(
    "format",
    [
        Scaled(inner=Integer()),
        Integer(scale_dtype="e4m3"),
        Offset(symmetric=True, scale_dtype="e4m3"),
        Doubled(),
        Rolled(),
        Vector(outliers=0.1),
    ],
    ids=repr,
)
def test_codes_that_mean_something_else_are_not_taken_for_these(format: Format) -> None:
    assert meaning_of(format, Option(4, 64)) is None


def test_of_several_formats_the_one_that_the_option_names_is_asked() -> None:
    mixed = Mixed(formats={"integer": Integer(), "float": Float()})
    assert isinstance(meaning_of(mixed, Option(3, 64, "integer")), Integers)
    assert isinstance(meaning_of(mixed, Option(3, 64, "float")), Levels)
