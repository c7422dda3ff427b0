"""The packed layout: dense, lossless, and GPTQ's where GPTQ has one."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aptq import packing


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 16), out=st.integers(1, 40), width=st.integers(1, 100), seed=st.integers(0, 2**16))
def test_round_trip(bits: int, out: int, width: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (out, width), generator=torch.Generator().manual_seed(seed))
    packed = packing.pack(codes, bits)
    with patch.object(packing, "_FEW", 0):  # as many codes are packed
        assert torch.equal(packing.pack(codes, bits), packed)
    assert packed.dtype == torch.int32
    assert tuple(packed.shape) == packing.packed_shape(out, width, bits)
    with patch.object(packing, "_FEW", 0):
        unpacked = packing.unpack(packed, bits, width)
    assert unpacked.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    assert torch.equal(unpacked.long(), codes)
    few = packing.unpack_few(packed, bits, width)
    assert few.dtype == unpacked.dtype
    assert torch.equal(few, unpacked)
    assert torch.equal(packing.unpack(packed, bits, width), unpacked)
    inputs = torch.randint(width, (7,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(packing.unpack_inputs(packed, bits, inputs).long(), codes[:, inputs])


@pytest.mark.parametrize("bits", range(1, 17))
def test_exactly_bits_per_weight_and_every_bit_used(bits: int) -> None:
    full = packing.pack(torch.full((3, 64), (1 << bits) - 1), bits)
    assert full.numel() * 32 == 3 * 64 * bits
    assert bool((full == -1).all()), "codes of ones must set every bit, the sign bits included"
    assert bool((packing.pack(torch.zeros(3, 64, dtype=torch.int64), bits) == 0).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_is_a_view_of_gptq_qweight(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, 96))
    per_word = 32 // bits
    expected = torch.zeros(96 // per_word, 5, dtype=torch.int64)
    for k in range(96):
        expected[k // per_word] |= codes[:, k] << (bits * (k % per_word))
    words = packing.pack(codes, bits).view(-1, 5).long() & 0xFFFFFFFF
    assert torch.equal(words, expected)


def test_three_bit_planes_merge_by_whole_words() -> None:
    """One shift and one mask bring the high bits of eight codes above their low bits."""
    codes = torch.randint(0, 8, (4, 32))
    low0, low1, high = (packing.pack(codes, 3)[0, word].long() & 0xFFFFFFFF for word in range(3))
    for r, word in enumerate((low0, low1)):
        for p in range(2):
            shift = 2 * r + p - 2
            moved = high >> shift if shift >= 0 else high << -shift
            nibbles = ((word >> 2 * p) & 0x33333333) | (moved & 0x44444444)
            for i in range(8):
                assert torch.equal((nibbles >> 4 * i) & 0xF, codes[:, 16 * r + 2 * i + p])


@pytest.mark.parametrize(("bits", "codes"), [(2, [[4]]), (3, [[-1]]), (8, [[256]]), (12, [[4096]])])
def test_codes_out_of_range_are_refused(bits: int, codes: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="Codes must lie in"):
        packing.pack(torch.tensor(codes), bits)


@pytest.mark.parametrize("bits", [0, 17])
def test_widths_that_do_not_exist_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 16"):
        packing.pack(torch.zeros(1, 1, dtype=torch.int64), bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 12, 24, 32])
@pytest.mark.parametrize("width", [32, 33, 100])
def test_rows_are_streams_of_bits(bits: int, width: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, width), dtype=torch.int64)
    codes[0] = (1 << bits) - 1  # the sign bits of words, too
    packed = packing.pack_rows(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (5, -(-width * bits // 32))
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum((word % (1 << 32)) << (32 * at) for at, word in enumerate(words))
        assert stream == sum(code << (bits * at) for at, code in enumerate(row))
