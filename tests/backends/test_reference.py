from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aptq.activations.block_scaled import BlockScaled
from aptq.api import ActivationBackend, Backend, Curvature, Option
from aptq.backends.reference import Reference
from aptq.formats.integer import Integer
from aptq.quantizers.nearest import Nearest
from tests.backends.specs import spec_of


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matmul_multiplies_by_the_dequantized_weight(dtype: torch.dtype, symmetric: bool) -> None:
    format, option = Integer(symmetric=symmetric), Option(3, 32)
    torch.manual_seed(0)
    weight = torch.randn(40, 70)
    nearest = Nearest()
    factors = nearest.prepare(Curvature(column=torch.eye(70)[None], tokens=1))
    quantized = nearest.quantize(weight, factors, format, option).weight
    spec = spec_of(format, option, (40, 70), dtype)
    backend = Reference()
    assert isinstance(backend, Backend)
    assert backend.priority == 0
    assert backend.refuses(spec) is None
    tensors = format.pack(quantized, option)
    prepacked = backend.prepack(tensors, spec)
    assert all(prepacked[name] is tensor for name, tensor in tensors.items())
    x = torch.randn(2, 5, 70, dtype=dtype)
    y = backend.matmul(x, prepacked, spec)
    assert y.dtype == dtype
    torch.testing.assert_close(y, x @ format.dequantize(quantized, option).to(dtype).T)
    assert isinstance(backend, ActivationBackend)
    rounded = replace(spec, activation=BlockScaled(bits=4))
    assert backend.refuses(rounded) is None
    expected = BlockScaled(bits=4).quantize(x) @ format.dequantize(quantized, option).to(dtype).T
    torch.testing.assert_close(backend.matmul(x, prepacked, rounded), expected)
