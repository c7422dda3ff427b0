"""Layers for backends to take or to refuse."""

from __future__ import annotations

import torch
from torch import Tensor

from aptq import packing
from aptq.api import Backend, Format, LayerSpec, Option
from aptq.formats.asymmetric_float import AsymmetricFloat
from aptq.formats.block_clustered import BlockClustered
from aptq.formats.float import Float
from aptq.formats.integer import Integer
from aptq.formats.trellis import Trellis
from aptq.formats.vector import Vector
from aptq.layer import PackedLinear

FORMATS = {
    "integer": Integer(),
    "symmetric": Integer(symmetric=True, scale_dtype="bfloat16"),
    "float32 scales": Integer(scale_dtype="float32"),
    "normal": Float(),
    "fp": Float(code="fp", scale_dtype="bfloat16"),
    "two-sided": AsymmetricFloat(),
}
"""What packed kernels read."""

TRELLISES = {
    "trellis": Trellis(),
    "trellis of 12 bits": Trellis(state_bits=12, scale_dtype="bfloat16"),
}
"""Values of states, which some of them read too."""


TABLES = {
    **TRELLISES,
    "blocks": BlockClustered(),
    "blocks of 16": BlockClustered(block_size=16, num_codebooks=16, scale_dtype="bfloat16"),
    "one codebook": BlockClustered(num_codebooks=1, scale_dtype="float16"),
    "nvfp4": Float(code="fp", scale_dtype="e4m3"),
    "mxfp4": Float(code="fp", scale_dtype="e8m0"),
    "vectors": Vector(bits_3="v4-k64-64"),
    "vectors without scales": Vector(bits_3="v8-k256", normalize="none", scale_dtype="bfloat16"),
}
"""Whose values are looked up in larger tables, or whose scales are bytes."""


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


def layer_of(
    format: Format, option: Option, shape: tuple[int, int] = (70, 200), bias: bool = False
) -> tuple[PackedLinear, Tensor]:
    """Return a packed layer of random codes, not of a weight's, and its dense weight in float64."""
    generator = torch.Generator().manual_seed(3)
    layer = PackedLinear(shape[1], shape[0], bias=bias, format=format, format_name="anything", option=option)
    groups = option.num_groups(shape[1])
    count = (1 << option.bits) - (format == FORMATS["fp"])  # of fp, one code has no level
    state = {"qweight": packing.pack(torch.randint(0, count, shape, generator=generator), option.bits)}
    for name in ("scales", "scales_below"):
        if name in layer.packed_names:
            state[name] = (0.01 + torch.rand(groups, shape[0], generator=generator)).to(layer.get_buffer(name).dtype)
    if "qzeros" in layer.packed_names:
        zeros = torch.randint(0, 1 << option.bits, (groups, shape[0]), generator=generator)
        state["qzeros"] = packing.pack(zeros, option.bits)
    if bias:
        state["bias"] = torch.randn(shape[0], generator=generator)
    layer.load_state_dict(state)
    return layer, layer.dense().double()


def check_products_as_good_as_bfloat16(
    name: str, backend: Backend, format: Format, option: Option, shape: tuple[int, int]
) -> None:
    """See that a layer in bfloat16 is off from float64 by no more than weights of bfloat16 make it."""
    layer, dense = layer_of(format, option, shape)
    layer = layer.bfloat16()
    layer.select_backend(name, {name: backend})
    for rows in (1, 2, 3, 7, 40):
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).bfloat16()
        exact = x.double() @ dense.T
        assert (layer(x).double() - exact).norm() <= 2**-7 * exact.norm(), (shape, rows)


def check_bias_and_leading_shapes(
    name: str, backend: Backend, format: Format, option: Option, shape: tuple[int, int]
) -> PackedLinear:
    """See that a layer in bfloat16 adds its bias and takes any leading shape; return it."""
    layer, _ = layer_of(format, option, shape, bias=True)
    layer = layer.bfloat16()
    layer.select_backend(name, {name: backend})
    dense = layer.dense().double()
    for leading in ((), (0,), (1, 1), (2, 3, 4)):
        x = torch.randn(*leading, shape[1]).bfloat16()
        exact = x.double() @ dense.T + layer.bias
        assert layer(x).shape == (*leading, shape[0])
        assert (layer(x).double() - exact).norm() <= 2**-7 * exact.norm()
    return layer
