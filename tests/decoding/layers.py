"""Packed layers on the CPU's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from aptq.api import Curvature, Option
from aptq.backends.cpu import Cpu
from aptq.formats.integer import Integer
from aptq.layer import PackedLinear
from aptq.quantizers.nearest import Nearest
from aptq.transforms.hadamard import Hadamard


def packed_linear(weight: Tensor, bits: int, transform: Hadamard | None = None) -> PackedLinear:
    """Return a layer of integers whose weight is near ``weight``, in the transform's basis."""
    format, option, (rows, columns) = Integer(), Option(bits, 32), weight.shape
    nearest = Nearest()
    factors = nearest.prepare(Curvature(column=torch.eye(columns)[None], tokens=1))
    layer = PackedLinear(
        columns, rows, bias=False, format=format, format_name="integer", option=option, transform=transform
    )
    layer.load_state_dict(dict(format.pack(nearest.quantize(weight, factors, format, option).weight, option)))
    layer.select_backend("cpu", {"cpu": Cpu()})
    return layer
