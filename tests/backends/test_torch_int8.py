from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aptq.api import Backend, Format, LayerSpec, Option
from aptq.backends.cpu import Cpu
from aptq.backends.reference import Reference
from aptq.backends.torch_int8 import TorchInt8
from aptq.backends.triton import Triton
from aptq.formats.integer import Integer
from aptq.testing import check_backend
from tests.backends.specs import (
    check_bias_and_leading_shapes,
    check_products_as_good_as_bfloat16,
    layer_of,
    spec_of,
)

INT8 = TorchInt8()
SYMMETRIC = {dtype: Integer(symmetric=True, scale_dtype=dtype) for dtype in ("float16", "bfloat16", "float32")}
SPEC = spec_of(SYMMETRIC["float16"], Option(8, -1), (64, 128), torch.bfloat16)


def test_it_is_a_backend_between_our_kernels_and_the_reference() -> None:
    assert isinstance(INT8, Backend)
    assert min(Cpu().priority, Triton().priority) > INT8.priority > Reference().priority


@pytest.mark.parametrize("format", SYMMETRIC.values(), ids=SYMMETRIC)
def test_conformance(format: Format) -> None:
    check_backend(INT8, format=format, bits=(8,), shapes=((64, 128), (20, 48), (5, 33)), group_sizes=(32, -1))


@pytest.mark.parametrize("format", SYMMETRIC.values(), ids=SYMMETRIC)
def test_products_are_as_good_as_weights_of_bfloat16(format: Format) -> None:
    for shape, group in (((4, 16), -1), ((52, 208), 208), ((64, 512), 1024)):
        check_products_as_good_as_bfloat16("torch_int8", INT8, format, Option(8, group), shape)


def test_a_bias_any_leading_shape_and_views_that_begin_anywhere() -> None:
    layer = check_bias_and_leading_shapes("torch_int8", INT8, SYMMETRIC["float16"], Option(8, -1), (48, 192))
    for view in (torch.randn(192, 5).bfloat16().T, torch.randn(1 + 3 * 192).bfloat16()[1:].view(3, 192)):
        torch.testing.assert_close(layer(view), layer(view.clone(memory_format=torch.contiguous_format)))


def test_what_is_prepacked_is_as_small_as_the_codes() -> None:
    layer, _ = layer_of(SYMMETRIC["float16"], Option(8, -1), (64, 1024))
    layer = layer.bfloat16()
    layer.select_backend("torch_int8", {"torch_int8": INT8})
    sizes = {name: buffer.nbytes for name, buffer in layer.named_buffers() if name.startswith("prepacked")}
    assert sizes == {"prepacked_codes": 64 * 1024, "prepacked_scales": 2 * 64}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (replace(SPEC, dtype=torch.float16), "activations of bfloat16, not float16"),
        (replace(SPEC, option=Option(4, -1)), "integers of 8 bits, not codes of 4"),
        (replace(SPEC, option=Option(8, 64)), "one scale for an output, not groups of 64 inputs"),
        (replace(SPEC, in_features=120), "a multiple of 16 inputs and of 4 outputs, not 120 inputs and 64 outputs"),
        (replace(SPEC, out_features=66), "a multiple of 16 inputs and of 4 outputs, not 128 inputs and 66 outputs"),
        (replace(SPEC, format=Integer()), "symmetric integers, without zeros"),
        (replace(SPEC, device=torch.device("meta")), "on the CPU and on CUDA devices, not on meta"),
    ],
)
def test_refusals_tell_why(spec: LayerSpec, reason: str) -> None:
    assert reason in str(INT8.refuses(spec))


@pytest.mark.gpu
def test_conformance_on_a_gpu() -> None:
    shapes = ((64, 128), (20, 48), (256, 1024))
    if reason := INT8.refuses(replace(SPEC, device=torch.device("cuda"))):
        pytest.skip(reason)
    check_backend(INT8, format=SYMMETRIC["float16"], bits=(8,), shapes=shapes, group_sizes=(-1,), device="cuda")
