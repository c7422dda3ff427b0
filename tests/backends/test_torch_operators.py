"""What backends that are operators of torch itself ask."""

from dataclasses import replace

import torch

from aptq.api import Option
from aptq.backends.torch_operators import refuses_integers, refuses_operator
from aptq.formats.integer import Integer
from tests.backends.specs import FORMATS, spec_of

SPEC = spec_of(Integer(), Option(4, 64), (64, 128), torch.bfloat16)


def test_an_operator_has_to_be_there_for_the_device() -> None:
    assert refuses_operator(SPEC, "_weight_int4pack_mm_for_cpu") is None
    assert "has no _no_such_operator for cpu" in str(refuses_operator(SPEC, "_no_such_operator"))
    assert "not on meta" in str(refuses_operator(replace(SPEC, device=torch.device("meta")), "mm"))


def test_integers_of_one_width_under_bfloat16() -> None:
    assert refuses_integers(SPEC, 4) is None
    assert "codes of 4" in str(refuses_integers(SPEC, 8))
    assert "activations of bfloat16, not float32" in str(refuses_integers(replace(SPEC, dtype=torch.float32), 4))
    assert "not the levels" in str(refuses_integers(replace(SPEC, format=FORMATS["normal"]), 4))
