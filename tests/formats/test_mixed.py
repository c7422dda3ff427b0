"""Several formats as one."""

import pytest
import torch

from aptq.api import AptqError, FormatSet, Option, format_of
from aptq.exporters.compressed_tensors import CompressedTensors
from aptq.formats.asymmetric_float import AsymmetricFloat
from aptq.formats.float import Float
from aptq.formats.integer import Integer
from aptq.formats.mixed import Mixed
from aptq.quantizers.gptq import GPTQ
from aptq.registry import build
from aptq.testing import check_format, check_quantizer

MIXED = Mixed(formats={"integer": Integer(group_size=32), "asymmetric_float": AsymmetricFloat(group_size=48)})


def test_keeps_the_contract() -> None:
    check_format(MIXED, bits=(2, 3, 4, 8), group_sizes=(16,), shapes=((6, 40), (5, 33), (1, 1)))
    check_quantizer(GPTQ(), format=MIXED, bits=(3,))


def test_each_layer_is_stored_as_its_own_format_does_it() -> None:
    weight = torch.randn(1, 8, 96)
    for name, format in MIXED.formats.items():
        option = Option(3, 32, name)
        assert format_of(MIXED, option) is format
        stored, alone = (
            each.pack(grid.finish(grid.round(weight.transpose(1, 2), slice(None))[0]), option)
            for each in (MIXED, format)
            for grid in (each.fit(weight, option),)
        )
        assert stored.keys() == alone.keys() == MIXED.packed_layout(option, (8, 96)).keys()
        assert all(torch.equal(stored[key], alone[key]) for key in alone)


def test_the_first_format_says_the_group_size_and_any_other_format_is_itself() -> None:
    assert MIXED.group_size == 32
    assert isinstance(MIXED, FormatSet)
    assert not isinstance(Integer(), FormatSet)
    assert format_of(Integer(), Option(3, 32, "float")) == Integer()


def test_formats_come_from_their_sections_and_mistakes_in_them_are_told() -> None:
    built = build(
        "format", {"name": "mixed", "formats": {"a": {"name": "integer"}, "b": {"name": "float", "code": "fp"}}}
    )
    assert built == Mixed(formats={"a": Integer(), "b": Float(code="fp")})
    with pytest.raises(AptqError, match="Did you mean 'integer'"):
        build("format", {"name": "mixed", "formats": {"a": {"name": "intger"}}})
    with pytest.raises(AptqError, match="Did you mean 'group_size'"):
        build("format", {"name": "mixed", "formats": {"a": {"name": "integer", "groupsize": 3}}})
    with pytest.raises(AptqError, match="formats cannot be 'integer'"):
        build("format", {"name": "mixed", "formats": "integer"})
    with pytest.raises(AptqError, match=r"needs a value for 'formats'"):
        build("format", {"name": "mixed"})
    with pytest.raises(AptqError, match=r"format\.formats is empty"):
        build("format", {"name": "mixed", "formats": {}})
    with pytest.raises(AptqError, match="a mixture itself"):
        Mixed(formats={"inner": MIXED})


def test_a_format_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(AptqError, match="No format 'float' is in the set; there are integer, asymmetric_float"):
        MIXED.check(Option(3, 32, "float"), (8, 96))


def test_layers_in_symmetric_integers_can_be_exported_whatever_else_there_is() -> None:
    mixed = Mixed(formats={"integer": Integer(symmetric=True, scale_dtype="bfloat16"), "float": Float()})
    config = type("Config", (), {"model_type": "llama", "dtype": torch.bfloat16})()
    shapes = {"layer": (8, 128)}
    CompressedTensors().check(mixed, "mixed", [Option(4, 64, "integer")], shapes=shapes, config=config)
    with pytest.raises(AptqError, match="symmetric integers"):
        CompressedTensors().check(mixed, "mixed", [Option(4, 64, "float")], shapes=shapes, config=config)
