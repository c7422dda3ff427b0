from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from aptq.api import Backend, Format, LayerSpec, Option
from aptq.backends.bitsandbytes import Bitsandbytes
from aptq.backends.cpu import Cpu
from aptq.backends.reference import Reference
from aptq.backends.torch_int4 import TorchInt4
from aptq.backends.triton import Triton
from aptq.formats.float import Float
from aptq.formats.integer import Integer
from aptq.testing import check_backend
from tests.backends.specs import FORMATS, layer_of, spec_of

BNB = Bitsandbytes()
SPEC = spec_of(Float(), Option(4, 64), (48, 128))
NEEDS_IT = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@dataclass(frozen=True)
class TheirFP4(Float):
    """Floats with the levels of bitsandbytes' FP4, its two zeros among them."""

    def _levels(self, option: Option, like: Tensor) -> Tensor:
        positive = torch.tensor([0.0, 0.0625, 2, 3, 4, 6, 8, 12]).to(like) / 12
        return torch.cat([-positive.flip(0), positive])


def test_it_is_a_backend_between_our_kernels_and_the_reference() -> None:
    assert isinstance(BNB, Backend)
    assert min(each.priority for each in (Cpu(), Triton(), TorchInt4())) > BNB.priority > Reference().priority


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (replace(SPEC, dtype=torch.float64), "float32, float16 and bfloat16, not float64"),
        (replace(SPEC, device=torch.device("cuda")), "float16 and bfloat16, not float32"),
        (replace(SPEC, option=Option(3, 64)), "codes of 4 bits, not 3"),
        (replace(SPEC, option=Option(4, 48)), "whole groups of 32, 64, 128, 256, 512, 1024 inputs"),
        (replace(SPEC, in_features=160), "not 160 inputs in groups of 64"),
        (replace(SPEC, format=Integer()), "levels with one scale, which format anything has not"),
        (replace(SPEC, format=FORMATS["two-sided"]), "levels with one scale, which format anything has not"),
        (replace(SPEC, format=Float(scale_dtype="e4m3")), "cannot read scales"),
        (replace(SPEC, device=torch.device("meta")), "on the CPU and on CUDA devices, not on meta"),
    ],
)
def test_refusals_tell_why(spec: LayerSpec, reason: str) -> None:
    assert reason in str(BNB.refuses(spec))


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aptq.backends.bitsandbytes.find_spec", lambda name: None)
    assert "pip install 'aptq[bitsandbytes]'" in str(BNB.refuses(SPEC))


def test_one_that_cannot_be_imported_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, Tensor]:
        raise OSError("libcudart.so is not there")

    monkeypatch.setattr("aptq.backends.bitsandbytes.find_spec", lambda name: object())
    monkeypatch.setattr("aptq.backends.bitsandbytes._tables", broken)
    assert "0.50 or newer is needed: libcudart.so is not there" in str(BNB.refuses(SPEC))


@NEEDS_IT
def test_levels_that_it_has_not_are_refused() -> None:
    assert "not those of bitsandbytes' NF4 or FP4" in str(BNB.refuses(replace(SPEC, format=Float(code="fp"))))


@NEEDS_IT
@pytest.mark.parametrize("format", [Float(), Float(scale_dtype="bfloat16"), TheirFP4()])
def test_conformance(format: Format) -> None:
    check_backend(BNB, format=format, bits=(4,), shapes=((64, 128), (5, 96), (5, 33)), group_sizes=(32, 64, -1))


@NEEDS_IT
@pytest.mark.parametrize("format", [Float(), TheirFP4()])
def test_products_are_those_of_float64(format: Format) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2**-7)):
        for shape, group in (((70, 192), 64), ((33, 1024), 1024), ((40, 256), -1)):
            layer, dense = layer_of(format, Option(4, group), shape, bias=True)
            layer = layer.to(dtype)
            layer.select_backend("bitsandbytes", {"bitsandbytes": BNB})
            assert layer.bias is not None
            for leading in ((), (0,), (1,), (7,), (2, 20)):
                x = torch.randn(*leading, shape[1]).to(dtype)
                exact = x.double() @ dense.T + layer.bias
                assert layer(x).shape == exact.shape
                assert (layer(x).double() - exact).norm() <= tolerance * exact.norm(), (dtype, shape, leading)


@NEEDS_IT
def test_what_is_prepacked_is_as_small_as_the_codes() -> None:
    layer, _ = layer_of(Float(), Option(4, 64), (64, 1024))
    layer.select_backend("bitsandbytes", {"bitsandbytes": BNB})
    sizes = {name: buffer.nbytes for name, buffer in layer.named_buffers() if name.startswith("prepacked")}
    assert sizes == {"prepacked_nf4": 64 * 1024 // 2, "prepacked_scales": 64 * (1024 // 64) * 4}


@pytest.mark.gpu
@NEEDS_IT
def test_conformance_on_a_gpu() -> None:
    shapes = ((64, 128), (48, 96), (256, 1024))
    check_backend(BNB, format=Float(), bits=(4,), shapes=shapes, group_sizes=(32, 64, -1), device="cuda")
