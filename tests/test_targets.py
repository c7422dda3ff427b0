from __future__ import annotations

import pytest

from aptq.api import AptqError, Option
from aptq.targets import Target, fuses, get_target

SHAPES = {"a": (64, 100), "b": (32, 64)}


def test_native_serves_every_width_at_its_bits_and_group_sizes() -> None:
    options = [Option(bits, size) for bits in range(2, 9) for size in (-1, 16, 32, 64, 96, 128)]
    get_target("native").check(options, SHAPES)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (Option(9, 32), r"native serves 1, 2, .* bits; got bits=9"),
        (Option(9, 32), "bits=9"),
        (Option(4, 40), r"multiples of 16 and -1 \(a whole row\); got group_size=40"),
        (Option(4, 0), "group_size=0"),
        (Option(4, -32), "group_size=-32"),
    ],
)
def test_native_refuses_with_what_is_allowed(option: Option, message: str) -> None:
    with pytest.raises(AptqError, match=message):
        get_target("native").check([Option(4, 64), option], SHAPES)


def test_a_target_may_ask_for_one_of_some_sizes_that_divide() -> None:
    target = Target(name="strict", bits=(4,), group_sizes=(32, 64), per_row=False, divisible=True)
    target.check([Option(4, 32)], {"b": (32, 64)})
    with pytest.raises(AptqError, match="32 does not divide the 100 of a"):
        target.check([Option(4, 32)], SHAPES)
    with pytest.raises(AptqError, match="serves group sizes 32, 64; got group_size=-1"):
        target.check([Option(4, -1)], {})
    with pytest.raises(AptqError, match="group_size=128"):
        target.check([Option(4, 128)], {})


def test_an_unknown_target_is_answered_with_the_nearest_and_the_list() -> None:
    with pytest.raises(AptqError, match=r"'nativ'.*native.*Targets: native"):
        get_target("nativ")


def test_what_serves_others_fuses_layers_and_says_so() -> None:
    vllm, native = get_target("vllm"), get_target("native")
    assert fuses(vllm, None)
    assert not fuses(native, None)
    assert fuses(native, True)
    with pytest.raises(AptqError, match="target=vllm runs query, key and value"):
        fuses(vllm, False)
    native.check_exporter("compressed_tensors")
    with pytest.raises(AptqError, match="reads what exporter=compressed_tensors writes"):
        vllm.check_exporter("native")
