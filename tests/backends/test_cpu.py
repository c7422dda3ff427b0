from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import pytest
import torch

from aptq.api import AptqError, Backend, Format, LayerSpec, Option
from aptq.backends.cpu import Cpu
from aptq.backends.reference import Reference
from aptq.backends.select import choose_backend
from aptq.formats.float import Float
from aptq.formats.integer import Integer
from aptq.formats.trellis import Trellis
from aptq.formats.trellis_code import states_of, values_of_states
from aptq.layer import PackedLinear
from aptq.testing import check_backend
from aptq.transforms.hadamard import Hadamard
from tests.backends.specs import FORMATS, TRELLISES, layer_of, spec_of

CPU = Cpu()


def test_it_is_a_backend_before_the_reference() -> None:
    assert isinstance(CPU, Backend)
    spec = spec_of(Integer(), Option(4, 64))
    assert isinstance(choose_backend(spec).backend, Cpu)
    assert CPU.priority > Reference().priority


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_conformance(format: Format) -> None:
    check_backend(CPU, format=format, bits=(3, 4), shapes=((64, 128), (5, 33)), group_sizes=(32, 64, -1))


@pytest.mark.parametrize("format", TRELLISES.values(), ids=TRELLISES)
def test_conformance_of_states(format: Format) -> None:
    check_backend(CPU, format=format, bits=(1, 2, 3, 4, 5, 6), shapes=((64, 128), (5, 33)), group_sizes=(32, 64, -1))


@pytest.mark.parametrize("format", [Integer(), Float(), Trellis()], ids=lambda format: type(format).__name__)
def test_it_rotates_inputs_itself(format: Format) -> None:
    check_backend(CPU, format=format, bits=(3,), shapes=((64, 128), (5, 33)), group_sizes=(32,), transform=Hadamard(1))


def test_layers_of_a_width_share_their_rotation() -> None:
    made = [
        PackedLinear(
            64, 32, bias=False, format=Integer(), format_name="integer", option=Option(4, 64), transform=transform
        )
        for transform in (Hadamard(), Hadamard(), Hadamard(seed=1))
    ]
    for layer in made:
        layer.select_backend("cpu", {"cpu": CPU})
    first, second, other = (dict(layer.named_buffers())["prepacked_signs"].data_ptr() for layer in made)
    assert first == second != other
    assert "prepacked_signs" not in made[0].state_dict()
    x = torch.randn(2, 64)
    assert torch.equal(copy.deepcopy(made[0])(x), made[0](x))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_float64(name: str, bits: int, threads: int) -> None:
    format = FORMATS[name]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape, group in (((70, 200), 64), ((33, 129), 96), ((200, 330), 160), ((40, 300), -1)):
            option = Option(bits, group)
            try:
                format.check(option, shape)
            except AptqError:
                continue
            layer, dense = layer_of(format, option, shape)
            layer.select_backend("cpu", {"cpu": CPU})
            for rows in (1, 2, 3, 7, 40, 70):
                x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
                y = layer(x).double()
                assert (y - x.double() @ dense.T).norm() <= 1e-6 * (x.double() @ dense.T).norm(), (shape, rows)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bits", range(1, 7))
@pytest.mark.parametrize("name", TRELLISES)
def test_values_of_states_are_those_of_float64(name: str, bits: int, threads: int) -> None:
    """Strips of threads begin within the run of codes; the last shapes have several of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape, group in (((1, 1), -1), ((70, 200), 64), ((33, 129), 96), ((431, 70), 32), ((1090, 45), -1)):
            layer, dense = layer_of(TRELLISES[name], Option(bits, group), shape)
            layer.select_backend("cpu", {"cpu": CPU})
            for rows in (*range(1, 10), 40):
                x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
                y, exact = layer(x).double(), x.double() @ dense.T
                assert (y - exact).norm() <= 1e-6 * exact.norm(), (shape, rows)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("name", FORMATS | TRELLISES)
def test_half_precision_is_as_good_as_its_own_rounding(name: str, rows: int, dtype: torch.dtype) -> None:
    layer, dense = layer_of((FORMATS | TRELLISES)[name], Option(4, 64))
    layer = layer.to(dtype)
    layer.select_backend("cpu", {"cpu": CPU})
    x = torch.randn(rows, 200).to(dtype)
    y, exact = layer(x), x.double() @ dense.T
    assert y.dtype == dtype
    assert (y.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


def test_a_bias_and_any_leading_shape() -> None:
    layer, dense = layer_of(Integer(), Option(3, 64), bias=True)
    layer.select_backend("cpu", {"cpu": CPU})
    for leading in ((), (0,), (1, 1), (2, 3, 4)):
        x = torch.randn(*leading, 200)
        exact = x.double() @ dense.T + layer.bias
        torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-4)
    strided = torch.randn(200, 5).T
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()))


def test_the_checkpoints_tensors_are_shared_and_nothing_grows() -> None:
    layer, _ = layer_of(Integer(), Option(4, 64))
    layer.select_backend("cpu", {"cpu": CPU})
    assert {name for name, _ in layer.named_buffers()} == set(layer.packed_names)


def test_int8_activations_are_off_by_a_percent() -> None:
    layer, dense = layer_of(Integer(), Option(4, 64))
    for activations, low, high in (("int8", 1e-4, 2e-2), ("exact", 0.0, 1e-6)):
        layer.select_backend("cpu", {"cpu": Cpu(activations=activations)})  # type: ignore[arg-type]
        x = torch.randn(3, 200)
        exact = x.double() @ dense.T
        assert low <= (layer(x).double() - exact).norm() / exact.norm() <= high


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_in_its_row(bad: float) -> None:
    layer, _ = layer_of(Integer(), Option(4, 64))
    layer.select_backend("cpu", {"cpu": CPU})
    x = torch.randn(3, 200)
    x[1, 150] = bad
    y = layer(x)
    assert y[[0, 2]].isfinite().all()
    assert not y[1].isfinite().any()


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_tiny_and_huge_activations(scale: float) -> None:
    layer, dense = layer_of(Integer(), Option(4, 64))
    layer.select_backend("cpu", {"cpu": CPU})
    x = torch.randn(1, 200) * scale
    torch.testing.assert_close(layer(x).double(), x.double() @ dense.T, rtol=1e-3, atol=1e-39)


def test_an_outlier_hides_nothing_that_the_result_could_show() -> None:
    layer, dense = layer_of(Integer(), Option(4, 128), (70, 512))
    layer.select_backend("cpu", {"cpu": CPU})
    x = torch.randn(4, 512)
    x[:, 7] = 3e4
    exact = x.double() @ dense.T
    assert (layer(x).double() - exact).norm() <= 1e-6 * exact.norm()


def test_a_layer_of_states_is_compiled_as_one_graph_and_knows_any_leading_shape() -> None:
    layer, dense = layer_of(Trellis(), Option(3, 64), bias=True)
    layer.select_backend("cpu", {"cpu": CPU})
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for leading in ((), (0,), (1, 1), (2, 3, 4)):
        x = torch.randn(*leading, 200)
        exact = x.double() @ dense.T + layer.bias
        for y in (layer(x), compiled(x)):
            torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)


def test_layers_of_a_kind_share_their_table_of_states() -> None:
    layers = [layer_of(Trellis(), Option(bits, 64))[0] for bits in (3, 3, 2)]
    for layer in layers:
        layer.select_backend("cpu", {"cpu": CPU})
    first, second, other = (dict(layer.named_buffers())["prepacked_states"].data_ptr() for layer in layers)
    assert first == second != other


def test_a_weight_that_was_quantized_is_multiplied_as_the_reference_does() -> None:
    format, option = Trellis(group_size=32), Option(2, 32)
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    grid = format.fit(weight[None], option)
    codes, _ = grid.round(weight.T[None], slice(None))
    layer = PackedLinear(96, 48, bias=False, format=format, format_name="anything", option=option)
    layer.load_state_dict(format.pack(grid.finish(codes), option))
    x, products = torch.randn(3, 96), []
    for name, backend in (("cpu", CPU), ("reference", Reference())):
        layer.select_backend(name, {name: backend})
        products.append(layer(x))
    torch.testing.assert_close(*products)
    assert (products[0] - x @ weight.T).norm() < 0.4 * (x @ weight.T).norm()


class Wide(Trellis):
    """States of codes that are wider than any kernel's."""

    def dequantize(self, quantized, option):  # type: ignore[no-untyped-def]
        states = states_of(quantized.codes.T.contiguous(), option.bits, 10)
        return (values_of_states(4, 10)[states] * quantized.parameters["scales"].float()).T


class Cubes(Integer):
    """Stored as symmetric integers are, and means something else."""

    def dequantize(self, quantized, option):  # type: ignore[no-untyped-def]
        return super().dequantize(quantized, option) ** 3


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (spec_of(Integer(), Option(4, 48)), "multiple of 32 inputs and whole rows, not of 48"),
        (spec_of(Integer(), Option(4, 64), dtype=torch.float64), "float32, float16 and bfloat16, not float64"),
        (spec_of(Cubes(), Option(4, 64)), "neither integers nor levels"),
        (spec_of(Trellis(), Option(4, 48)), "multiple of 32 inputs and whole rows, not of 48"),
        (spec_of(Trellis(), Option(4, 64), dtype=torch.float64), "float32, float16 and bfloat16, not float64"),
        (spec_of(Wide(), Option(7, -1)), "states of codes of at most 6 bits, not 7"),
    ],
)
def test_refusals_tell_why(spec: LayerSpec, reason: str) -> None:
    assert reason in str(CPU.refuses(spec))


def test_without_a_compiler_auto_takes_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    installed = {"cpu": Cpu(cache_dir=str(tmp_path / "none")), "reference": Reference()}
    choice = choose_backend(spec_of(Integer(), Option(4, 64)), "auto", installed)
    assert choice.backend is installed["reference"]
    assert "no C++ compiler is on the PATH" in choice.refusals["cpu"]
    with pytest.raises(AptqError, match=r"cpu cannot run .*no C\+\+ compiler.*backend=auto"):
        choose_backend(spec_of(Integer(), Option(4, 64)), "cpu", installed)


@pytest.mark.parametrize("options", [{"activations": "int4"}, {"architecture": "armv8"}])
def test_options_that_cannot_be(options: dict[str, str]) -> None:
    with pytest.raises(AptqError, match="is not known; use"):
        Cpu(**options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["x86-64-v3", "x86-64-v4"])
def test_other_instruction_sets_give_the_same(architecture: str) -> None:
    other = Cpu(architecture=architecture)
    if reason := other.refuses(spec_of(Integer(), Option(4, 64))):
        pytest.skip(reason)
    for format in (FORMATS | TRELLISES).values():
        widths = {Integer: range(2, 9), Trellis: range(1, 7)}
        for bits in widths.get(type(format), (3, 4)):
            layer, dense = layer_of(format, Option(bits, 64))
            layer.select_backend("cpu", {"cpu": other})
            for rows, dtype in product((1, 7, 40), (torch.float32, torch.bfloat16)):
                x = torch.randn(rows, 200).to(dtype)
                exact = x.double() @ dense.T
                tolerance = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
                assert (layer(x).double() - exact).norm() <= tolerance * exact.norm()
