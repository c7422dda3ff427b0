"""Round to nearest."""

import torch

from aptq.api import Curvature, Option
from aptq.formats.integer import Integer
from aptq.quantizers.nearest import Nearest
from aptq.testing import check_quantizer


def test_keeps_the_contract() -> None:
    check_quantizer(Nearest())


def test_no_level_is_nearer() -> None:
    weight, option, format = torch.randn(6, 96), Option(3, 32), Integer()
    quantizer = Nearest()
    factors = quantizer.prepare(Curvature(column=torch.eye(96)[None], tokens=1))
    quantized = quantizer.quantize(weight, factors, format, option).weight
    chosen = (weight - format.dequantize(quantized, option)).abs()
    for shift in (-1, 1):
        codes = (quantized.codes.int() + shift).clamp(0, 7).to(torch.uint8)
        other = format.dequantize(type(quantized)(codes=codes, parameters=quantized.parameters), option)
        assert bool((chosen <= (weight - other).abs() + 1e-6).all())
