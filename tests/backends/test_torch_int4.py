from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aptq.api import Backend, Format, LayerSpec, Option
from aptq.backends.cpu import Cpu
from aptq.backends.reference import Reference
from aptq.backends.select import choose_backend
from aptq.backends.torch_int4 import TorchInt4
from aptq.backends.torch_int8 import TorchInt8
from aptq.backends.triton import Triton
from aptq.formats.integer import Integer
from aptq.testing import check_backend
from tests.backends.specs import (
    FORMATS,
    check_bias_and_leading_shapes,
    check_products_as_good_as_bfloat16,
    layer_of,
    spec_of,
)

INT4 = TorchInt4()
INTEGERS = {name: format for name, format in FORMATS.items() if isinstance(format, Integer)}
SPEC = spec_of(Integer(), Option(4, 64), (64, 128), torch.bfloat16)


def test_it_is_a_backend_between_our_kernels_and_the_reference() -> None:
    assert isinstance(INT4, Backend)
    assert min(Cpu().priority, Triton().priority) > INT4.priority > Reference().priority
    installed = {"reference": Reference(), "torch_int8": TorchInt8(), "torch_int4": INT4}
    assert choose_backend(SPEC, "auto", installed).name == "torch_int4"
    assert choose_backend(replace(SPEC, dtype=torch.float32), "auto", installed).name == "reference"


@pytest.mark.parametrize("format", INTEGERS.values(), ids=INTEGERS)
def test_conformance(format: Format) -> None:
    check_backend(INT4, format=format, bits=(4,), shapes=((64, 128), (48, 96), (5, 33)), group_sizes=(32, 64, -1))


@pytest.mark.parametrize("name", INTEGERS)
def test_products_are_as_good_as_weights_of_bfloat16(name: str) -> None:
    for shape, group in (((16, 32), 32), ((48, 192), 64), ((80, 256), 128), ((96, 512), 256), ((64, 128), -1)):
        check_products_as_good_as_bfloat16("torch_int4", INT4, INTEGERS[name], Option(4, group), shape)


def test_a_bias_and_any_leading_shape() -> None:
    layer = check_bias_and_leading_shapes("torch_int4", INT4, Integer(), Option(4, 64), (48, 192))
    strided = torch.randn(192, 5).bfloat16().T
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()))


def test_what_is_prepacked_is_as_small_as_the_codes() -> None:
    layer, _ = layer_of(Integer(), Option(4, 64), (64, 1024))
    layer = layer.bfloat16()
    layer.select_backend("torch_int4", {"torch_int4": INT4})
    sizes = {name: buffer.nbytes for name, buffer in layer.named_buffers() if name.startswith("prepacked")}
    assert sizes == {"prepacked_packed": 64 * 1024 // 2, "prepacked_scales_and_shifts": 64 * (1024 // 64) * 2 * 2}
    assert set(layer.state_dict()) == set(layer.packed_names)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (replace(SPEC, dtype=torch.float32), "activations of bfloat16, not float32"),
        (replace(SPEC, option=Option(3, 64)), "integers of 4 bits, not codes of 3"),
        (replace(SPEC, out_features=24), "a multiple of 16 outputs, not 24"),
        (replace(SPEC, option=Option(4, 48)), "32, 64, 128, 256 inputs, not 128 inputs in groups of 48"),
        (replace(SPEC, in_features=160), "not 160 inputs in groups of 64"),
        (replace(SPEC, option=Option(4, -1), in_features=512), "not 512 inputs in groups of 512"),
        (replace(SPEC, format=FORMATS["normal"]), "integers, not the levels of format anything"),
        (replace(SPEC, device=torch.device("meta")), "on the CPU and on CUDA devices, not on meta"),
    ],
)
def test_refusals_tell_why(spec: LayerSpec, reason: str) -> None:
    assert reason in str(INT4.refuses(spec))


def test_a_torch_without_the_operator_is_a_refusal() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has the operator for GPUs")
    assert "has no _weight_int4pack_mm for cuda" in str(INT4.refuses(replace(SPEC, device=torch.device("cuda"))))


@pytest.mark.gpu
@pytest.mark.parametrize("format", INTEGERS.values(), ids=INTEGERS)
def test_conformance_on_a_gpu(format: Format) -> None:
    shapes = ((64, 128), (48, 96), (256, 1024))
    check_backend(INT4, format=format, bits=(4,), shapes=shapes, group_sizes=(32, 64, -1), device="cuda")
