"""The Triton kernels in Triton's interpreter, which has to be on before Triton is imported: test_triton.py runs this.

Every output begins as NaN. No bfloat16: the interpreter is wrong there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from aptq import packing
from aptq.api import LayerSpec, Option
from aptq.backends.triton import Triton
from aptq.formats.asymmetric_float import AsymmetricFloat
from aptq.formats.float import Float
from aptq.formats.integer import Integer
from aptq.kernels.triton import launch, ops
from aptq.kernels.triton.configs import Config
from aptq.kernels.triton.weight import PackedWeight
from aptq.testing import check_backend

MEANINGS = ("zeros", "symmetric", "levels", "two-sided")
CONFIGS = {
    "gemv": Config(kernel="gemv", units=2, columns=32),
    "gemv of rows": Config(kernel="gemv", rows=4, units=4, columns=64),
    "dot": Config(kernel="dot", rows=16, units=2, columns=64),
    "dense": Config(kernel="dense", units=4, columns=64),
}


_patch, _patched = interpreter._patch_lang, set[int]()


def _patch_once(function: Callable[..., object]) -> interpreter._LangPatchScope:
    """Change what a module sees as Triton's language, and leave it so: changes at every call took half the time."""
    if id(function.__globals__) not in _patched:
        _patched.add(id(function.__globals__))
        _patch(function)
    return interpreter._LangPatchScope()  # of no change that would be taken back


interpreter._patch_lang = _patch_once


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let memory begin as NaN."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def poisoned(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(launch.torch, "empty", lambda *shape, **options: poisoned(empty(*shape, **options)))
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *shape, **options: poisoned(new_empty(self, *shape, **options))
    )


def layer_of(
    shape: tuple[int, int], bits: int, group: int, meaning: str, seed: int = 0, scale_dtype: torch.dtype = torch.float16
) -> tuple[PackedWeight, Tensor]:
    """Return a packed weight of random codes and what it stands for in float64."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-shape[1] // group)

    def positive() -> Tensor:
        return (torch.rand(groups, shape[0], generator=generator) + 0.01).to(scale_dtype)

    def spread(tensor: Tensor) -> Tensor:
        return tensor.double().repeat_interleave(group, 0)[: shape[1]].T

    codes = torch.randint(0, 1 << bits, shape, generator=generator)
    scales, zeros, levels, below = positive(), None, None, None
    if meaning in ("zeros", "symmetric"):
        zero = torch.full((groups, shape[0]), 1 << (bits - 1))
        if meaning == "zeros":
            zero = torch.randint(0, 1 << bits, zero.shape, generator=generator)
            zeros = zero.to(torch.uint8)
        dense = (codes - spread(zero)) * spread(scales)
    else:
        levels = torch.randn(1 << bits, generator=generator)
        values = levels.double()[codes]
        below = positive() if meaning == "two-sided" else None
        dense = (
            values * spread(scales)
            if below is None
            else values * torch.where(values < 0, spread(below), spread(scales))
        )
    packed = PackedWeight(
        qweight=packing.pack(codes, bits),
        scales=scales,
        below=below,
        zeros=zeros,
        levels=levels,
        in_features=shape[1],
        group=group,
    )
    return packed, dense


def assert_product(weight: launch.Weight, dense: Tensor, rows: int, config: Config, seed: int = 0) -> None:
    """Check a product: as good as float32, or as rounding to float16 of inputs, weights (``dot``) and outputs."""
    dtype = torch.float16 if config.kernel == "dot" else torch.float32
    x = torch.randn(rows, dense.shape[1], generator=torch.Generator().manual_seed(seed)).to(dtype)
    y = launch.multiply(x, weight, config, 1)
    exact = x.double() @ dense.T
    assert y.dtype == dtype
    assert (y.double() - exact).norm() <= (1e-6 if dtype == torch.float32 else 1e-3) * exact.norm()


EVERYTHING = [(name, bits, "zeros") for name in ("gemv", "dot", "dense") for bits in range(1, 9)]
EVERYTHING += [(name, bits, meaning) for name in ("gemv", "dot") for bits in (2, 3, 4) for meaning in MEANINGS[1:]]
EVERYTHING += [("dense", 3, "symmetric"), ("dense", 2, "levels"), ("dense", 4, "two-sided"), ("gemv", 5, "levels")]
EVERYTHING += [("gemv of rows", 3, "zeros"), ("gemv of rows", 8, "symmetric"), ("gemv of rows", 4, "two-sided")]


@pytest.mark.parametrize(("name", "bits", "meaning"), EVERYTHING)
def test_every_width_and_meaning(name: str, bits: int, meaning: str) -> None:
    weight, dense = layer_of((40, 77), bits, 32, meaning)  # a tail of outputs, inputs and units
    assert_product(weight, dense, 3 if name != "gemv" else 1, CONFIGS[name])


@pytest.mark.parametrize(
    ("shape", "group"),
    [((33, 100), 64), ((1, 1), 32), ((70, 33), 33), ((20, 96), 48), ((24, 50), 20)],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_and_groups(name: str, shape: tuple[int, int], group: int) -> None:
    whole_units = group % 32 == 0 or group >= shape[1]
    if name == "dot" and not whole_units:
        pytest.skip("dot is never chosen where groups are no whole units")
    weight, dense = layer_of(shape, 4, group, "zeros" if name == "dot" else "two-sided")
    assert_product(weight, dense, 5, CONFIGS[name])


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 160)),
    bits=st.integers(1, 8),
    group=st.sampled_from([16, 32, 64, 96, 1000]),
    rows=st.integers(1, 20),
    meaning=st.sampled_from(MEANINGS[:2]),
    name=st.sampled_from(list(CONFIGS)),
    programs=st.integers(1, 9),
    scale_dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_anything(
    shape: tuple[int, int],
    bits: int,
    group: int,
    rows: int,
    meaning: str,
    name: str,
    programs: int,
    scale_dtype: torch.dtype,
    seed: int,
) -> None:
    if name == "dot" and group % 32:
        group = 32
    weight, dense = layer_of(shape, bits, group, meaning, seed, scale_dtype)
    config = CONFIGS[name]
    config = Config(kernel=config.kernel, rows=config.rows, units=config.units, columns=64, programs=programs)
    assert_product(weight, dense, rows, config, seed)


@pytest.mark.parametrize("name", ["gemv", "dot"])
def test_parts_are_added_up_in_one_order(name: str) -> None:
    weight, dense = layer_of((20, 192), 3, 64, "zeros")
    config = CONFIGS[name]
    for programs in (2, 100):
        parts = Config(kernel=name, rows=config.rows, units=2, columns=64, programs=programs)
        assert_product(weight, dense, 2, parts)
        x = torch.randn(2, 192, generator=torch.Generator().manual_seed(1)).half()
        assert torch.equal(launch.multiply(x, weight, parts, 1), launch.multiply(x, weight, parts, 1))


def test_the_dense_weight_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_STRIP", 64 * 64)
    weight, dense = layer_of((150, 64), 3, 32, "zeros")
    assert_product(weight, dense, 9, CONFIGS["dense"])
    room = torch.empty(64, 70, dtype=torch.float16)
    strip = launch.unpack(weight, 64, 134, room, CONFIGS["dense"])
    torch.testing.assert_close(strip.double(), dense[64:134].T, rtol=1e-3, atol=1e-3)


def test_sums_leave_the_range_of_float16_and_come_back() -> None:
    weight = PackedWeight(
        qweight=packing.pack(torch.full((8, 256), 9), 4), scales=torch.ones(1, 8).half(), in_features=256, group=256
    )
    x = torch.full((1, 256), 57344.0)
    x[0, 128:] *= -1
    x[0, 200] = -49152.0
    x = x.half()
    for name, config in CONFIGS.items():
        if name != "dense":  # that is torch's own product
            y = launch.multiply(x, weight, config, 1)
            assert torch.equal(y, torch.full((1, 8), 8192.0).half()), name


def test_what_is_not_finite_stays_in_its_row() -> None:
    weight, _ = layer_of((40, 96), 4, 32, "zeros")
    for name, config in CONFIGS.items():
        x = torch.randn(3, 96).half()
        x[1, 50] = float("nan")
        y = launch.multiply(x, weight, config, 1)
        assert y[[0, 2]].isfinite().all(), name
        assert y[1].isnan().all(), name


@dataclass(frozen=True)
class Interpreted(Triton):
    """The backend without a look at the device."""

    def refuses(self, spec: LayerSpec) -> str | None:
        return self.refuses_layer(spec)


@pytest.fixture
def _on_the_cpu() -> object:
    """Let the operator run on the CPU, in the interpreter."""
    with torch.library._scoped_library("aptq", "IMPL") as library:
        library.impl("triton_matmul", ops.triton_matmul, "CPU")
        yield


@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("format", [Integer(), Integer(symmetric=True), Float(), AsymmetricFloat()], ids=str)
def test_conformance(format: object) -> None:
    check_backend(
        Interpreted(),
        format=format,  # type: ignore[arg-type]
        bits=(3,),
        shapes=((5, 33),),
        group_sizes=(32,),
        dtypes=(torch.float32, torch.float16),
    )


@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("leading", [(), (3,), (2, 1, 3), (0,)])
def test_the_operator(leading: tuple[int, ...]) -> None:
    weight, dense = layer_of((40, 64), 4, 32, "zeros")
    x = torch.randn(*leading, 64)
    arguments = (x, weight.qweight, weight.scales, None, weight.zeros, None, 32, "")
    torch.library.opcheck(torch.ops.aptq.triton_matmul, arguments)
    torch.testing.assert_close(
        torch.ops.aptq.triton_matmul(*arguments).double(), x.double() @ dense.T, rtol=1e-4, atol=1e-4
    )
    strided = torch.randn(64, 5).T
    torch.testing.assert_close(
        torch.ops.aptq.triton_matmul(strided, *arguments[1:]),
        torch.ops.aptq.triton_matmul(strided.contiguous(), *arguments[1:]),
    )


@pytest.mark.usefixtures("_on_the_cpu")
def test_options_of_a_layer_reach_the_kernels() -> None:
    format, option = Integer(group_size=48), Option(3, 48)
    weight = torch.randn(1, 20, 100)
    grid = format.fit(weight, option)
    quantized = grid.finish(grid.round(weight.transpose(1, 2), slice(None))[0])
    spec = LayerSpec(
        out_features=20,
        in_features=100,
        format=format,
        format_name="any",
        option=option,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    backend = Interpreted()
    assert backend.refuses(spec) is None
    x = torch.randn(2, 100)
    y = backend.matmul(x, backend.prepack(format.pack(quantized, option), spec), spec)
    torch.testing.assert_close(
        y.double(), x.double() @ format.dequantize(quantized, option).double().T, rtol=1e-4, atol=1e-4
    )
