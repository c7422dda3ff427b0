"""The Triton kernels of values that are looked up in large tables, in the interpreter: see ``interpreted``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aptq import packing
from aptq.api import Format
from aptq.formats.asymmetric_float import AsymmetricFloat
from aptq.formats.block_clustered import BlockClustered
from aptq.formats.float import Float
from aptq.formats.integer import Integer
from aptq.formats.trellis import Trellis
from aptq.formats.trellis_code import states_of
from aptq.formats.vector import Vector
from aptq.kernels.triton import launch, ops
from aptq.kernels.triton.configs import Config
from aptq.kernels.triton.weight import PackedWeight, VectorWeight
from aptq.testing import check_backend
from tests.kernels.triton.interpreted import Interpreted, _poison, assert_product

__all__ = ["_poison"]  # a fixture of every test

VECTOR_TENSORS = (
    "indices",
    "codebook",
    "residual_indices",
    "residual_codebook",
    "row_scales",
    "column_scales",
)
CONFIGS = {
    "gemv": Config(kernel="gemv", units=2, columns=32),
    "gemv of rows": Config(kernel="gemv", rows=4, units=4, columns=64),
    "dense": Config(kernel="dense", units=4, columns=64),
}


def states_layer(
    shape: tuple[int, int], bits: int, state_bits: int, group: int, seed: int = 0
) -> tuple[PackedWeight, Tensor]:
    """Return a weight of random codes whose states have random values, and what it stands for in float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, shape, generator=generator)
    table = torch.randn(1 << state_bits, generator=generator)
    scales = torch.rand(-(-shape[1] // group), shape[0], generator=generator) + 0.01
    values = table.double()[states_of(codes.T.contiguous(), bits, state_bits).long()]
    packed = PackedWeight(
        qweight=packing.pack(codes, bits), scales=scales, states=table, in_features=shape[1], group=group
    )
    return packed, (values * scales.double().repeat_interleave(group, 0)[: shape[1]]).T


EVERYTHING = [("gemv", bits, state_bits) for bits in range(1, 7) for state_bits in (10, 12)]
EVERYTHING += [("dense", 1, 12), ("dense", 2, 10), ("dense", 6, 12)]


@pytest.mark.parametrize(("name", "bits", "state_bits"), EVERYTHING)
def test_states_of_every_width(name: str, bits: int, state_bits: int) -> None:
    weight, dense = states_layer((45, 77), bits, state_bits, 77)  # a tail of outputs, inputs and units
    assert_product(weight, dense, 1, CONFIGS[name])


@pytest.mark.parametrize(("shape", "group"), [((33, 70), 64), ((1, 1), 32), ((24, 50), 20)])
@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_and_groups_of_states(name: str, shape: tuple[int, int], group: int) -> None:
    weight, dense = states_layer(shape, 3, 10, group)
    assert_product(weight, dense, 5, CONFIGS[name])


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 160)),
    bits=st.integers(1, 6),
    state_bits=st.integers(6, 12),
    group=st.sampled_from([16, 32, 64, 96, 1000]),
    rows=st.integers(1, 9),
    name=st.sampled_from(list(CONFIGS)),
    programs=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_any_states(
    shape: tuple[int, int], bits: int, state_bits: int, group: int, rows: int, name: str, programs: int, seed: int
) -> None:
    weight, dense = states_layer(shape, bits, state_bits, group, seed)
    assert_product(weight, dense, rows, replace(CONFIGS[name], programs=programs), seed)


def test_parts_and_strips_of_states(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, dense = states_layer((150, 128), 2, 12, 128)
    parts = Config(kernel="gemv", rows=2, units=2, columns=64, programs=100)
    assert_product(weight, dense, 2, parts)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(1)).half()
    assert torch.equal(launch.multiply(x, weight, parts, 1), launch.multiply(x, weight, parts, 1))
    monkeypatch.setattr(launch, "_STRIP", 64 * 128)  # strips begin within a run of codes
    assert_product(weight, dense, 9, CONFIGS["dense"])


def test_what_is_not_finite_stays_in_its_row_of_states() -> None:
    weight, _ = states_layer((40, 96), 4, 10, 32)
    for name, config in CONFIGS.items():
        x = torch.randn(3, 96)
        x[1, 50] = float("nan")
        y = launch.multiply(x, weight, config, 1)
        assert y[[0, 2]].isfinite().all(), name
        assert y[1].isnan().all(), name


def blocks_layer(
    shape: tuple[int, int], bits: int, selector_bits: int, group: int, in_bytes: bool = True, seed: int = 0
) -> tuple[PackedWeight, Tensor]:
    """Return a weight of random entries of random codebooks, blocks of 8, and what it stands for in float64."""
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = shape
    codes = torch.randint(0, 1 << bits, shape, generator=generator)
    levels = torch.randn(1 << (bits + selector_bits), generator=generator)
    units = -(-in_features // 32)
    chosen = torch.randint(0, 1 << selector_bits, (units * 4, out_features), generator=generator)
    bytes_of = torch.rand(256, generator=generator) + 0.01
    stored = torch.randint(0, 256, (-(-in_features // group), out_features), generator=generator)
    scales = bytes_of[stored]
    words = (chosen.view(units, 4, out_features) << 4 * torch.arange(4)[:, None]).sum(1)
    packed = PackedWeight(
        qweight=packing.pack(codes, bits),
        scales=stored.to(torch.uint8) if in_bytes else scales,
        scale_values=bytes_of if in_bytes else None,
        selectors=words.to(torch.int16) if selector_bits else None,
        levels=levels,
        in_features=in_features,
        group=group,
    )
    places = codes + (chosen.repeat_interleave(8, 0)[:in_features].T << bits)
    return packed, levels.double()[places] * scales.double().repeat_interleave(group, 0)[:in_features].T


BLOCKS = [("gemv", bits, 3, 16, True) for bits in range(1, 9) if bits < 6] + [("gemv", 7, 0, 32, True)]
BLOCKS += [("gemv", 8, 0, 8, True), ("gemv", 4, 4, 8, False), ("gemv", 3, 4, 24, False), ("gemv", 2, 1, 99, True)]
BLOCKS += [("dense", 2, 4, 8, True), ("dense", 3, 3, 24, True), ("dense", 4, 0, 16, True), ("dense", 6, 0, 40, True)]
BLOCKS += [("gemv of rows", 3, 3, 8, True), ("gemv of rows", 4, 2, 64, False)]


@pytest.mark.parametrize(("name", "bits", "selector_bits", "group", "in_bytes"), BLOCKS)
def test_codebooks_and_bytes(name: str, bits: int, selector_bits: int, group: int, in_bytes: bool) -> None:
    weight, dense = blocks_layer((45, 99), bits, selector_bits, group, in_bytes)
    assert_product(weight, dense, 3 if name != "gemv" else 1, CONFIGS[name])


@pytest.mark.parametrize("shape", [(1, 1), (70, 33), (24, 128)])
def test_shapes_of_codebooks(shape: tuple[int, int]) -> None:
    weight, dense = blocks_layer(shape, 4, 3, 64)
    for name, config in CONFIGS.items():
        assert_product(weight, dense, 5, replace(config, programs=3 if name == "gemv" else 1))


def vectors_layer(
    shape: tuple[int, int],
    bits: int,
    length: int,
    group: int,
    residual: bool,
    scaled: bool,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> tuple[VectorWeight, Tensor]:
    """Return a weight of random vectors, and what it stands for in float64."""
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = shape
    vectors, groups = -(-out_features // length), -(-in_features // group)
    dense, tensors = torch.zeros(vectors, in_features, length, dtype=torch.float64), {}
    for name, book in (("indices", "codebook"), ("residual_indices", "residual_codebook"))[: 1 + residual]:
        codes = torch.randint(0, 1 << bits, (vectors, in_features), generator=generator)
        tensors[book] = torch.randn(groups, 1 << bits, length, generator=generator).to(dtype)
        tensors[name] = packing.pack(codes, bits)
        dense += tensors[book].double()[torch.arange(in_features) // group, codes]
    if scaled:
        tensors["row_scales"] = (torch.rand(vectors, generator=generator) + 0.1).to(dtype)
        tensors["column_scales"] = (torch.rand(in_features, generator=generator) + 0.1).to(dtype)
        dense *= tensors["row_scales"].double()[:, None, None] * tensors["column_scales"].double()[:, None]
    weight = VectorWeight(**tensors, out_features=out_features, in_features=in_features, group=group)
    return weight, dense.transpose(1, 2).flatten(0, 1)[:out_features]


VECTORS = [("gemv", 8, 8, 77, False, True, torch.float16), ("gemv", 6, 4, 32, True, True, torch.bfloat16)]
VECTORS += [("gemv", 3, 2, 20, True, False, torch.float16), ("gemv", 5, 2, 77, False, True, torch.float32)]
VECTORS += [("gemv", 4, 16, 77, False, True, torch.float16), ("gemv", 7, 8, 48, False, False, torch.float32)]
VECTORS += [("gemv of rows", 2, 4, 64, True, True, torch.float16), ("dense", 8, 8, 48, False, True, torch.float16)]
VECTORS += [("dense", 6, 4, 77, True, True, torch.bfloat16), ("dense", 1, 2, 20, True, False, torch.float32)]


@pytest.mark.parametrize(("name", "bits", "length", "group", "residual", "scaled", "dtype"), VECTORS)
def test_vectors(
    name: str, bits: int, length: int, group: int, residual: bool, scaled: bool, dtype: torch.dtype
) -> None:
    weight, dense = vectors_layer((45, 77), bits, length, group, residual, scaled, dtype)  # tails of all dimensions
    assert_product(weight, dense, 3 if name != "gemv" else 1, CONFIGS[name])


@pytest.mark.parametrize("shape", [(1, 1), (70, 33)])
def test_shapes_of_vectors(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_STRIP", 64 * shape[1])
    weight, dense = vectors_layer(shape, 4, 8, 32, False, True)
    for name, config in CONFIGS.items():
        assert_product(weight, dense, 5, replace(config, programs=3 if name == "gemv" else 1))


@pytest.fixture
def _on_the_cpu() -> object:
    """Let the operators run on the CPU, in the interpreter."""
    with torch.library._scoped_library("aptq", "IMPL") as library:
        for name in ("triton_matmul", "triton_states_matmul", "triton_blocks_matmul", "triton_vectors_matmul"):
            library.impl(name, getattr(ops, name), "CPU")
        yield


@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize(
    ("format", "bits", "dtype"),
    [
        (Trellis(group_size=20), 2, torch.float32),
        (Trellis(state_bits=12, scale_dtype="bfloat16"), 4, torch.float16),
        (BlockClustered(group_size=24), 3, torch.float32),
        (BlockClustered(block_size=16, num_codebooks=16, codebooks="calibrated"), 2, torch.float16),
        (BlockClustered(num_codebooks=1, scale_dtype="float16"), 4, torch.float32),
        (Float(code="fp", group_size=16, scale_dtype="e4m3"), 4, torch.float32),
        (Float(code="fp", group_size=32, scale_dtype="e8m0"), 4, torch.float16),
        (Float(group_size=32), 1, torch.float32),
        (AsymmetricFloat(group_size=32), 1, torch.float32),
        (Integer(symmetric=True, scale_dtype="e4m3"), 5, torch.float32),
        (Vector(bits_2="v8-k32"), 2, torch.float32),
        (Vector(bits_3="v4-k16-16", group_size=20, normalize="none"), 3, torch.float16),
    ],
)
def test_conformance(format: Format, bits: int, dtype: torch.dtype) -> None:
    check_backend(Interpreted(), format=format, bits=(bits,), shapes=((5, 70),), group_sizes=(), dtypes=(dtype,))


@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("leading", [(1, 2), (0,)])
def test_the_operators(leading: tuple[int, ...]) -> None:
    x = torch.randn(*leading, 64)
    states, of_states = states_layer((40, 64), 4, 10, 32)
    blocks, of_blocks = blocks_layer((40, 64), 3, 3, 16)
    names = ("scale_values", "selectors", "levels")
    for operator, weight, dense, more in (
        (torch.ops.aptq.triton_states_matmul, states, of_states, (states.states, 32)),
        (torch.ops.aptq.triton_blocks_matmul, blocks, of_blocks, (*(getattr(blocks, each) for each in names), 16)),
    ):
        arguments = (x, weight.qweight, weight.scales, *more, "")
        torch.library.opcheck(operator, arguments)
        torch.testing.assert_close(operator(*arguments).double(), x.double() @ dense.T, rtol=1e-4, atol=1e-4)
    vectors, of_vectors = vectors_layer((40, 64), 4, 4, 32, True, True)
    arguments = (x, *(getattr(vectors, each) for each in VECTOR_TENSORS), 40, 32, "")
    torch.library.opcheck(torch.ops.aptq.triton_vectors_matmul, arguments)
    found = torch.ops.aptq.triton_vectors_matmul(*arguments)
    torch.testing.assert_close(found.double(), x.double() @ of_vectors.T, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_on_the_cpu")
def test_compiled_graphs_do_not_break_at_the_operators() -> None:
    x = torch.randn(2, 64)
    states, _ = states_layer((40, 64), 4, 10, 32)
    blocks, _ = blocks_layer((64, 40), 3, 3, 16)
    vectors, _ = vectors_layer((24, 64), 4, 4, 64, False, True)

    def layers(x: Tensor) -> Tensor:
        x = torch.ops.aptq.triton_states_matmul(x, states.qweight, states.scales, states.states, 32, "")
        found = (blocks.scale_values, blocks.selectors, blocks.levels)
        x = torch.ops.aptq.triton_blocks_matmul(x * 0.1, blocks.qweight, blocks.scales, *found, 16, "")
        tensors = (getattr(vectors, name) for name in VECTOR_TENSORS)
        return torch.ops.aptq.triton_vectors_matmul(x * 0.1, *tensors, 24, 64, "")

    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layers(x))
