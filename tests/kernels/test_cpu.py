from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aptq import packing
from aptq.api import AptqError
from aptq.backends.cpu import Cpu
from aptq.formats.trellis_code import states_of
from aptq.kernels.cpu import load_kernels, ops, read_states
from aptq.kernels.cpu.build import build
from aptq.kernels.cpu.library import TYPES, Packed, Turn
from aptq.kernels.quantiles import quantiles
from aptq.transforms.hadamard import Hadamard

FOLDER = Cpu().cache_dir


def random_layer(
    out_features: int, in_features: int, bits: int, group: int, *, zeros: bool, seed: int = 0
) -> tuple[Packed, Tensor]:
    """Return a packed layer of integers and its dense weight in float64."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-in_features // group)
    codes = torch.randint(0, 1 << bits, (out_features, in_features), generator=generator)
    scales = (torch.rand(groups, out_features, generator=generator) + 0.01).half()
    zero = torch.full((groups, out_features), 1 << (bits - 1))
    if zeros:
        zero = torch.randint(0, 1 << bits, zero.shape, generator=generator)
    qzeros = packing.pack(zero, bits) if zeros else None
    spread = [each.double().repeat_interleave(group, 0)[:in_features].T for each in (zero, scales)]
    layer = Packed(packing.pack(codes, bits), scales, None, qzeros, None, in_features, group)
    return layer, (codes - spread[0]) * spread[1]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    out_features=st.integers(1, 80),
    in_features=st.integers(1, 300),
    bits=st.integers(1, 8),
    group=st.sampled_from([32, 64, 96, 128, 160, 320]),
    rows=st.integers(1, 9),
    zeros=st.booleans(),
    dtype=st.sampled_from(list(TYPES)),
    spread=st.floats(0, 6),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_values(
    out_features: int,
    in_features: int,
    bits: int,
    group: int,
    rows: int,
    zeros: bool,
    dtype: torch.dtype,
    spread: float,
    seed: int,
) -> None:
    layer, dense = random_layer(out_features, in_features, bits, group, zeros=zeros, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, in_features, generator=generator)
    x = (x * torch.exp(spread * torch.randn(in_features, generator=generator)).clamp(max=1e3)).to(dtype)
    y = load_kernels("native", FOLDER).multiply(x, layer, 3)
    exact = x.double() @ dense.T
    info, digits = torch.finfo(dtype), 65793 if dtype == torch.float32 else 257
    step = x.double().abs().amax(1, keepdim=True) / (127 * digits)  # of the fixed-point numbers, or smaller
    summed = 1e-6 * x.double().abs() @ dense.abs().T
    allowed = step / 2 * dense.abs().sum(1) * (1 + 1e-3) + summed + info.eps * exact.abs() + 1e-7
    fits = exact.abs() + allowed < info.max
    assert ((y.double() - exact).abs() <= allowed)[fits].all()
    beyond = exact.abs() - allowed > info.max  # of float16: infinity, as of any product in it
    assert torch.equal(y.double()[beyond], exact[beyond].sign() * float("inf"))


def test_every_output_is_written_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs begin as NaN, inside a larger tensor whose rest stays as it is."""
    for bits, (out_features, in_features) in ((1, (33, 70)), (4, (1, 1)), (3, (97, 64)), (8, (31, 33))):
        layer, dense = random_layer(out_features, in_features, bits, 32, zeros=True)
        guarded = torch.full((5, 3 + 2, out_features), float("nan"))

        def poisoned(self: Tensor, shape: tuple[int, int], room: Tensor = guarded) -> Tensor:
            return room[1].view(-1)[: shape[0] * shape[1]].view(shape)

        x, kernels = torch.randn(3, in_features), load_kernels("native", FOLDER)
        for many in (False, True):
            guarded.fill_(float("nan"))
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "new_empty", poisoned)
                y = kernels.many(x, layer) if many else kernels.multiply(x, layer, 3)
            room = 1e-6 * x.double().abs() @ dense.abs().T  # a few roundings of float32 in each term
            assert bool(((y.double() - x.double() @ dense.T).abs() <= room).all())
            assert guarded[[0, 2, 3, 4]].isnan().all()
            assert guarded[1].view(-1)[3 * out_features :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", range(1, 9))
def test_dense_strips_are_the_weight(bits: int, dtype: torch.dtype) -> None:
    layer, dense = random_layer(70, 45, bits, 32, zeros=True)
    kernels = load_kernels("native", FOLDER)
    room = torch.full((64, 64), float("nan"), dtype=dtype)
    for begin, end in ((0, 64), (64, 70), (32, 70)):
        strip = kernels.dense(layer, begin, end, room)
        assert torch.equal(strip, dense[begin:end].T.float().to(dtype))


def random_levels(
    out_features: int, in_features: int, bits: int, group: int, *, two_sided: bool, seed: int = 0
) -> tuple[Packed, Tensor]:
    """Return a packed layer of levels, with one scale or one for each side, and its dense weight in float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (out_features, in_features), generator=generator)
    above, below = (torch.rand(2, -(-in_features // group), out_features, generator=generator) + 0.01).half()
    levels = torch.randn(1 << bits, generator=generator).repeat(16 >> bits)
    dense = levels.double()[codes]
    sides = [each.double().repeat_interleave(group, 0)[:in_features].T for each in (above, below)]
    dense = dense * torch.where((dense < 0) & two_sided, sides[1], sides[0])
    qweight = packing.pack(codes, bits)
    return Packed(qweight, above, below if two_sided else None, None, levels, in_features, group), dense


KINDS = ("integers", "zeros", "levels", "two_sided", "table", "computed")


def random_of(
    kind: str, out_features: int, in_features: int, bits: int, group: int, seed: int
) -> tuple[Packed, Tensor]:
    """Return a layer of a kind, of the nearest width that there is, and its dense weight in float64."""
    shape = out_features, in_features
    if kind in ("integers", "zeros"):
        return random_layer(*shape, bits, group, zeros=kind == "zeros", seed=seed)
    if kind in ("levels", "two_sided"):
        return random_levels(*shape, min(max(bits, 2), 4), group, two_sided=kind == "two_sided", seed=seed)
    return random_states(*shape, min(bits, 6), group, 10 + 2 * (seed % 2), computed=kind == "computed", seed=seed)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(KINDS),
    out_features=st.integers(1, 200),
    in_features=st.integers(1, 900),
    bits=st.integers(1, 8),
    group=st.sampled_from([32, 64, 96, 128, 160, 320]),
    rows=st.integers(1, 20) | st.integers(33, 130),
    dtype=st.sampled_from(list(TYPES)),
    seed=st.integers(0, 1000),
)
def test_many_rows_of_any_shape(
    kind: str, out_features: int, in_features: int, bits: int, group: int, rows: int, dtype: torch.dtype, seed: int
) -> None:
    kernels = load_kernels("native", FOLDER)
    layer, dense = random_of(kind, out_features, in_features, bits, group, seed)
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if dtype == torch.bfloat16 and kernels.fast_pairs:
        dense = dense.float().bfloat16().double()
    y, exact, spread = kernels.many(x, layer), x.double() @ dense.T, x.double().abs() @ dense.abs().T
    assert ((y.double() - exact).abs() <= 1e-5 * spread + torch.finfo(dtype).eps * exact.abs() + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_are_the_same_for_any_number_of_threads_and_rows(kind: str, dtype: torch.dtype) -> None:
    kernels, before = load_kernels("native", FOLDER), torch.get_num_threads()
    layer, _ = random_of(kind, 200, 500, 3, 64, 0)
    x = torch.randn(4200, 500).to(dtype)
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(kernels.many(x, layer))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    for begin, end in ((0, 1), (7, 20), (300, 433), (4095, 4200)):
        assert torch.equal(kernels.many(x[begin:end], layer), results[0][begin:end])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", list(TYPES))
def test_many_rows_that_are_not_finite_stay_so(dtype: torch.dtype, bad: float) -> None:
    layer, _ = random_layer(70, 200, 4, 64, zeros=True)
    x = torch.randn(50, 200).to(dtype)
    x[17, 150] = bad
    y = load_kernels("native", FOLDER).many(x, layer)
    assert not y[17].isfinite().any()
    assert y[torch.arange(50) != 17].isfinite().all()


def turn_of(width: int) -> Turn:
    rotation = Hadamard().rotation(width)
    return Turn(rotation.signs, rotation.matrix)


def arguments(x: Tensor, bits: int = 4, turn: Iterable[Tensor | None] = (None, None)) -> tuple[object, ...]:
    layer, _ = random_layer(40, x.shape[-1], bits, 32, zeros=True)
    return x, layer.qweight, layer.scales, None, layer.qzeros, None, *turn, 32, False, "native", FOLDER


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("leading", [(), (3,), (2, 1, 3)])
def test_opcheck(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    for turn in ((None, None), turn_of(70)):
        torch.library.opcheck(torch.ops.aptq.cpu_matmul, arguments(torch.randn(*leading, 70).to(dtype), turn=turn))


def random_states(
    out_features: int,
    in_features: int,
    bits: int,
    group: int,
    state_bits: int,
    *,
    computed: bool = False,
    seed: int = 0,
) -> tuple[Packed, Tensor]:
    """Return a packed layer of values of states, any values or computed ones, and its dense weight in float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (out_features, in_features), generator=generator)
    scales = (torch.rand(-(-in_features // group), out_features, generator=generator) + 0.01).half()
    values = quantiles(seed * 2 + 7, state_bits) if computed else torch.randn(1 << state_bits, generator=generator)
    states = read_states(values)
    assert (states.dtype == torch.int32) == computed
    layer = Packed(packing.pack(codes, bits), scales, None, None, None, in_features, group, states)
    dense = values.double()[states_of(codes.T.contiguous(), bits, state_bits)].T
    return layer, dense * scales.double().repeat_interleave(group, 0)[:in_features].T


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    out_features=st.integers(1, 300),
    in_features=st.integers(1, 300),
    bits=st.integers(1, 6),
    group=st.sampled_from([32, 64, 96, 128, 160, 320]),
    state_bits=st.integers(8, 12),
    rows=st.integers(1, 9),
    dtype=st.sampled_from(list(TYPES)),
    computed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_of_states(
    out_features: int,
    in_features: int,
    bits: int,
    group: int,
    state_bits: int,
    rows: int,
    dtype: torch.dtype,
    computed: bool,
    seed: int,
) -> None:
    layer, dense = random_states(out_features, in_features, bits, group, state_bits, computed=computed, seed=seed)
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y = load_kernels("native", FOLDER).multiply(x, layer, 0)
    exact, spread = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    assert ((y.double() - exact).abs() <= 1e-6 * spread + torch.finfo(dtype).eps * exact.abs() + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", range(1, 7))
def test_dense_strips_of_states_are_the_weight(bits: int, dtype: torch.dtype) -> None:
    kernels = load_kernels("native", FOLDER)
    for state_bits, computed in product((8, 10, 12), (False, True)):
        layer, dense = random_states(70, 45, bits, 32, state_bits, computed=computed)
        room = torch.full((64, 64), float("nan"), dtype=dtype)
        for begin, end in ((0, 64), (64, 70), (32, 70)):
            strip = kernels.dense(layer, begin, end, room)
            assert torch.equal(strip, dense[begin:end].T.float().to(dtype))


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("leading", [(), (3,), (2, 1, 5)])
def test_opcheck_of_states(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, _ = random_states(40, 70, 3, 32, 10, computed=dtype == torch.float32)
    x = torch.randn(*leading, 70).to(dtype)
    for turn in ((None, None), turn_of(70)):
        given = x, layer.qweight, layer.scales, layer.states, *turn, 32, "native", FOLDER
        torch.library.opcheck(torch.ops.aptq.cpu_trellis_matmul, given)


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_inputs_are_rotated_as_by_themselves(rows: int, dtype: torch.dtype) -> None:
    """The same bits, whether a product rotates its inputs or is given rotated ones."""
    kernels, x, turn = load_kernels("native", FOLDER), torch.randn(rows, 576).to(dtype), turn_of(576)
    turned = kernels.rotate(x, turn)
    assert not torch.equal(turned, x)
    for layer, _ in (random_layer(40, 576, 4, 64, zeros=True), random_states(40, 576, 3, 64, 10)):
        assert torch.equal(kernels.multiply(x, layer, 3, turn), kernels.multiply(turned, layer, 3))
        assert torch.equal(kernels.many(x, layer, turn), kernels.many(turned, layer))
        assert torch.equal(ops._by_strips(kernels, layer, x, turn), ops._by_strips(kernels, layer, turned, None))


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_weights_of_one_input_in_one_call_are_the_same_to_the_bit(rows: int, dtype: torch.dtype) -> None:
    kernels, turn = load_kernels("native", FOLDER), turn_of(192)
    shapes = {(576, 2): True, (40, 3): False, (7, 8): True, (1000, 4): True}
    integers = [random_layer(out, 192, bits, 64, zeros=zeros)[0] for (out, bits), zeros in shapes.items()]
    table = torch.linspace(-1, 1, 16)
    levels = [layer._replace(levels=table, qzeros=None) for layer in integers if layer.qweight.shape[1] < 8]
    states = [random_states(out, 192, bits, 64, state)[0] for out, bits, state in ((96, 2, 10), (40, 3, 12))]
    x = torch.randn(rows, 192, generator=torch.Generator().manual_seed(1)).to(dtype)
    for layers in (integers, levels, states):
        alone = torch.cat([kernels.multiply(x, layer, 2, turn) for layer in layers], -1)
        for threads in (1, 2, 5):
            together = kernels.multiplier(layers, (rows,), dtype, 2, turn, threads)(x)
            assert torch.equal(together, alone)


def test_callers_on_several_threads_do_not_disturb_each_other() -> None:
    """One has the pool's threads at a time; the others work by themselves."""
    kernels = load_kernels("native", FOLDER)
    layers = [random_layer(1000, 192, bits, 64, zeros=True)[0] for bits in (2, 3, 4, 8)]
    x = torch.randn(2, 192)
    expected = [kernels.multiply(x, layer, 3, threads=1) for layer in layers]

    def right(index: int) -> bool:
        return all(torch.equal(kernels.multiply(x, layers[index], 3, threads=3), expected[index]) for _ in range(500))

    with ThreadPoolExecutor(len(layers)) as callers:
        assert all(callers.map(right, range(len(layers))))


def test_inputs_of_another_width_are_refused() -> None:
    for width in (64, 97):
        with pytest.raises(AptqError, match=f"width {width} were given to a weight of 65 to 96 inputs"):
            torch.ops.aptq.cpu_matmul(torch.randn(1, width), *arguments(torch.randn(1, 70))[1:])


def test_a_layer_whose_tensors_move_is_read_where_they_are() -> None:
    kernels, x = load_kernels("native", FOLDER), torch.randn(2, 70)
    layer, _ = random_layer(40, 70, 4, 32, zeros=True)
    before = kernels.multiply(x, layer, 3)
    old = layer.qweight.data_ptr()
    layer.qweight.share_memory_()
    assert layer.qweight.data_ptr() != old
    assert torch.equal(kernels.multiply(x, layer, 3), before)


def test_with_amx_many_rows_of_bfloat16_go_by_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(load_kernels("native", FOLDER), "tiles", True)
    monkeypatch.setattr(ops, "_by_strips", lambda kernels, packed, x, turn: taken.append(len(x)) or x[:, :40])
    for rows in (3, 40):
        for dtype in TYPES:
            torch.ops.aptq.cpu_matmul(*arguments(torch.randn(rows, 70).to(dtype)))
    assert taken == [40]


def test_strips_of_outputs_are_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_ROOM", 64 * 96)  # several strips of a small layer
    kernels = load_kernels("native", FOLDER)
    x = torch.randn(9, 70)
    for layer, dense in (random_layer(150, 70, 3, 32, zeros=False), random_states(150, 70, 3, 32, 10)):
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
            y = ops._by_strips(kernels, layer, x.to(dtype), None).double()
            exact = x.to(dtype).double() @ dense.T
            assert (y - exact).norm() <= tolerance * exact.norm()


def test_a_build_that_fails_says_what_the_compiler_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'kernels.cpp:1: error: no such luck' >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(AptqError, match=r"c\+\+ failed: kernels.cpp:1: error: no such luck"):
        build("native", str(tmp_path / "cache"))


def test_a_cpu_without_avx2_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho '#define __AVX2__ 1'\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(AptqError, match="the CPU lacks FMA, F16C"):
        build("native", str(tmp_path / "cache"))


def test_processes_that_build_at_once_end_with_one_file(tmp_path: Path) -> None:
    """With a compiler that only pretends, since what is looked at is the files."""
    real = subprocess.run(["sh", "-c", "command -v c++"], capture_output=True, text=True, check=True).stdout.strip()
    compiler = tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\nfor last; do :; done\ncase "$*" in *-dM*) exec {real} "$@";; esac\n'
        'sleep 0.5\necho built > "$last"\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    code = f"from aptq.kernels.cpu.build import build; print(build('native', {str(tmp_path / 'cache')!r}))"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    paths = {process.communicate()[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0]
    (path,) = paths
    assert [each.name for each in (tmp_path / "cache").iterdir()] == [Path(path).name]
    assert Path(path).read_text() == "built\n"
