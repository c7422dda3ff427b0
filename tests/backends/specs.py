"""Layers for backends to take or to refuse."""

from __future__ import annotations

import torch

from aptq.api import Format, LayerSpec, Option
from aptq.formats.asymmetric_float import AsymmetricFloat
from aptq.formats.float import Float
from aptq.formats.integer import Integer

FORMATS = {
    "integer": Integer(),
    "symmetric": Integer(symmetric=True, scale_dtype="bfloat16"),
    "float32 scales": Integer(scale_dtype="float32"),
    "normal": Float(),
    "fp": Float(code="fp", scale_dtype="bfloat16"),
    "two-sided": AsymmetricFloat(),
}
"""What packed kernels read."""


def spec_of(
    format: Format, option: Option, shape: tuple[int, int] = (70, 200), dtype: torch.dtype = torch.float32
) -> LayerSpec:
    """Return a layer of ``shape`` ``(out, in)`` on the CPU."""
    return LayerSpec(
        out_features=shape[0],
        in_features=shape[1],
        format=format,
        format_name="anything",
        option=option,
        dtype=dtype,
        device=torch.device("cpu"),
    )
