from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aptq.api import Backend, Format, LayerSpec, Option
from aptq.backends.humming import Humming, schema_of, stream, unordered
from aptq.backends.reference import Reference
from aptq.backends.torch_int4 import TorchInt4
from aptq.backends.triton import Triton
from aptq.formats.integer import Integer
from aptq.testing import check_backend
from tests.backends.specs import FORMATS, layer_of, spec_of

HUMMING = Humming()
INTEGERS = {"integer": Integer(), "symmetric": Integer(symmetric=True, scale_dtype="bfloat16")}
SPEC = replace(spec_of(Integer(), Option(4, 64), (64, 128), torch.bfloat16), device=torch.device("cuda"))


def test_it_is_a_backend_between_our_kernels_and_the_reference() -> None:
    assert isinstance(HUMMING, Backend)
    assert min(Triton().priority, TorchInt4().priority) > HUMMING.priority > Reference().priority


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (replace(SPEC, device=torch.device("cpu")), "on CUDA devices, not on cpu"),
        (replace(SPEC, dtype=torch.float32), "float16 and bfloat16, not float32"),
        (replace(SPEC, option=Option(1, 64)), "codes of 2 to 8 bits, not 1"),
        (replace(SPEC, option=Option(4, 48)), "32, 64, 128, 256, 512 inputs, not 128 inputs in groups of 48"),
        (replace(SPEC, out_features=96), "multiples of 64 outputs and inputs, not 96 outputs of 128 inputs"),
        (replace(SPEC, in_features=96), "multiples of 64 outputs and inputs, not 64 outputs of 96 inputs"),
        (replace(SPEC, format=FORMATS["normal"]), "integers, not the levels of format anything"),
    ],
)
def test_refusals_tell_why(spec: LayerSpec, reason: str) -> None:
    assert reason in str(HUMMING.refuses(spec))


def test_without_humming_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aptq.backends.humming.find_spec", lambda name: None)
    assert "pip install 'aptq[humming]'" in str(HUMMING.refuses(SPEC))


def test_a_torch_without_cuda_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aptq.backends.humming.find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is not built for NVIDIA GPUs" in str(HUMMING.refuses(SPEC))


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_follow_each_other_from_the_lowest_bit_on(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 64), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    for row, words in zip(codes.tolist(), stream(codes, bits).tolist(), strict=True):
        number = sum(code << bits * place for place, code in enumerate(row))
        assert [word % 2**32 for word in words] == [number >> 32 * place & 0xFFFFFFFF for place in range(2 * bits)]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("format", INTEGERS.values(), ids=INTEGERS)
@pytest.mark.parametrize("group", [32, -1])
def test_tensors_are_those_that_humming_asks_for(format: Format, bits: int, group: int) -> None:
    pytest.importorskip("humming.schema", reason="humming is not installed")
    spec = spec_of(format, Option(bits, group), (64, 128), torch.bfloat16)
    layer, _ = layer_of(format, spec.option, (64, 128))
    given = unordered(layer.packed(), spec)
    schema = schema_of(spec)
    schema.validate_tensors(given, 64, 128, torch.bfloat16, None)
    assert set(given) == set(schema.get_tensors_attrs(64, 128, torch.bfloat16))


@pytest.mark.parametrize("format", INTEGERS.values(), ids=INTEGERS)
def test_what_the_tensors_mean_is_the_layer(format: Format) -> None:
    """By humming's own definition: codes less zeros, or less half of their range, times scales."""
    layer, dense = layer_of(format, Option(4, 32), (64, 128))
    given = unordered(layer.packed(), spec_of(format, Option(4, 32), (64, 128), torch.bfloat16))
    nibbles = torch.arange(8) * 4
    codes = ((given["weight"].unsqueeze(-1) >> nibbles) & 15).view(64, 128)
    zeros = torch.full((64, 4), 8)
    if "zero_point" in given:
        zeros = ((given["zero_point"].T.unsqueeze(-1) >> nibbles) & 15).reshape(4, 64).T
    spread = [each.double().repeat_interleave(32, 1) for each in (zeros, given["weight_scale"])]
    torch.testing.assert_close((codes - spread[0]) * spread[1], dense, rtol=2**-8, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("format", INTEGERS.values(), ids=INTEGERS)
def test_conformance_on_a_gpu(format: Format) -> None:
    pytest.importorskip("humming.schema", reason="humming is not installed")
    shapes = ((64, 128), (576, 1536), (256, 1024))
    check_backend(HUMMING, format=format, bits=range(2, 9), shapes=shapes, group_sizes=(32, 64, -1), device="cuda")
