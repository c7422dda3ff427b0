from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from aptq import packing
from aptq.api import AptqError, Backend, Format, LayerSpec, Option
from aptq.backends.cpu import Cpu
from aptq.backends.select import choose_backend
from aptq.backends.triton import Triton
from aptq.formats.asymmetric_float import AsymmetricFloat
from aptq.formats.block_clustered import BlockClustered
from aptq.formats.float import Float
from aptq.formats.integer import Integer
from aptq.formats.scaled import Scaled
from aptq.formats.trellis import Trellis
from aptq.formats.vector import Vector
from aptq.layer import PackedLinear
from aptq.testing import check_backend
from tests.backends.specs import FORMATS, TABLES, spec_of

TRITON = Triton()
SPEC = spec_of(Integer(), Option(4, 64), dtype=torch.float16)
ON_CUDA = replace(SPEC, device=torch.device("cuda"))


def test_it_is_a_backend_before_the_cpus() -> None:
    assert isinstance(TRITON, Backend)
    assert TRITON.priority > Cpu().priority


def test_without_a_gpu_others_are_taken() -> None:
    choice = choose_backend(SPEC)
    assert not isinstance(choice.backend, Triton)
    assert choice.refusals["triton"] == "it runs on a CUDA device, not on cpu"
    with pytest.raises(AptqError, match=r"triton cannot run .*CUDA device, not on cpu.*backend=auto"):
        choose_backend(SPEC, "triton")


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aptq.backends.triton.find_spec", lambda name: None)
    assert "pip install 'aptq[gpu]'" in str(TRITON.refuses(ON_CUDA))


def test_gpus_are_asked_for_their_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aptq.backends.triton.find_spec", lambda name: SimpleNamespace())
    for capability, reason in (((7, 5), "compute capability 8.0"), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        answer = TRITON.refuses(ON_CUDA)
        assert (answer is None) if reason is None else (reason in str(answer))


class Cubes(Integer):
    """Stored as integers are, and means something else."""

    def dequantize(self, quantized, option):  # type: ignore[no-untyped-def]
        return super().dequantize(quantized, option) ** 3


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (spec_of(Integer(), Option(4, 64), dtype=torch.float64), "float32, float16 and bfloat16, not float64"),
        (spec_of(Cubes(), Option(4, 64)), "neither integers nor levels"),
        (spec_of(BlockClustered(block_size=12), Option(4, 24), (64, 128)), "multiple of 8 inputs, not of 12"),
        (spec_of(BlockClustered(block_size=4, num_codebooks=1), Option(4, 20)), "multiple of 8 inputs, not of 20"),
        (spec_of(Float(code="fp", scale_dtype="e4m3"), Option(4, 20)), "multiple of 8 inputs, not of 20"),
        (spec_of(AsymmetricFloat(scale_dtype="e4m3"), Option(4, 64)), "neither integers nor levels"),
        (spec_of(Vector(outliers=0.01), Option(2, 64)), "cannot read outlier_indices of format anything"),
        (spec_of(Vector(outliers=0.1), Option(2, 64)), "cannot read indices of format anything"),
        (spec_of(Vector(bits_2="v8-k4096"), Option(2, 64)), "indices of at most 8 bits.*not of 12 and 0 bits"),
        (spec_of(Vector(bits_2="v8-k256-16"), Option(2, 64)), "residual ones of as many, not of 8 and 4 bits"),
        (spec_of(Vector(bits_2="v6-k64"), Option(2, 64)), "vectors of 4, 8, 16 or 32 bytes, not 6 numbers of 12"),
        (spec_of(Scaled(inner=Integer()), Option(4, 64)), "cannot read input_scales of format anything"),
        (spec_of(Integer(), Option(8, 64), (1 << 19, 1 << 14)), "less than 2147483648 words"),
    ],
)
def test_layers_that_it_cannot_read(spec: LayerSpec, reason: str) -> None:
    assert re.search(reason, str(TRITON.refuses_layer(spec)))


@pytest.mark.parametrize("group", [20, 48, 64, -1])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_layers_that_it_reads(format: Format, group: int) -> None:
    assert TRITON.refuses_layer(spec_of(format, Option(3, group))) is None


@pytest.mark.parametrize("group", [32, 48, -1])
@pytest.mark.parametrize("format", TABLES.values(), ids=TABLES)
def test_layers_of_tables_that_it_reads(format: Format, group: int) -> None:
    assert TRITON.refuses_layer(spec_of(format, Option(3, group))) is None


def test_a_tuning_table_that_is_none_is_a_refusal(tmp_path: Path) -> None:
    assert "no tuning table" in str(Triton(tuning=str(tmp_path / "none.json")).refuses_layer(SPEC))


def test_zeros_become_bytes_and_the_rest_stays_shared() -> None:
    codes, zeros = torch.randint(0, 16, (70, 200)), torch.randint(0, 16, (4, 70))
    stored = {"qweight": packing.pack(codes, 4), "scales": torch.rand(4, 70), "qzeros": packing.pack(zeros, 4)}
    found = TRITON.prepack(stored, SPEC)
    assert found["qweight"] is stored["qweight"]
    assert found["scales"] is stored["scales"]
    assert found["zeros"].is_contiguous()
    assert found["zeros"].dtype == torch.uint8
    assert torch.equal(found["zeros"], zeros.byte())
    levels = TRITON.prepack({name: stored[name] for name in ("qweight", "scales")}, spec_of(Float(), Option(4, 64)))
    assert levels["levels"].shape == (16,)


def test_a_table_is_one_for_all_layers_of_a_kind() -> None:
    spec = spec_of(Trellis(), Option(2, 64))
    stored = {"qweight": torch.zeros(7, 2, 70, dtype=torch.int32), "scales": torch.rand(4, 70)}
    first, again = (TRITON.prepack(stored, each)["states"] for each in (spec, replace(spec, in_features=100)))
    assert first is again
    assert len(first) == 1024


def test_selectors_become_four_bits_for_eight_inputs() -> None:
    format, option = BlockClustered(block_size=16, num_codebooks=16), Option(4, 64)
    stored = _random_tensors(format, option, (70, 200))
    found = TRITON.prepack(stored, spec_of(format, option))
    chosen = packing.unpack(stored["selectors"], 4, 70)  # [13, 70]
    assert found["selectors"].shape == (7, 70)
    assert found["levels"].shape == (256,)
    for eight in range(25):
        assert torch.equal((found["selectors"][eight // 4].int() >> eight % 4 * 4) & 15, chosen[eight // 2].int())
    assert "codebooks" not in found
    unscaled = TRITON.prepack({**stored, "scale_unit": torch.ones(1)}, spec_of(format, option))["scale_values"]
    assert torch.equal(found["scale_values"][115:120], unscaled[115:120] / 64)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_conformance_on_a_gpu(format: Format) -> None:
    shapes = ((64, 128), (5, 33), (4096, 1024))
    check_backend(TRITON, format=format, bits=(2, 3, 4, 8), shapes=shapes, group_sizes=(32, 48, -1), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("format", TABLES.values(), ids=TABLES)
def test_conformance_of_tables_on_a_gpu(format: Format) -> None:
    shapes, groups = ((64, 128), (5, 33), (1024, 512)), (32, 48, -1)
    check_backend(TRITON, format=format, bits=(2, 3, 4), shapes=shapes, group_sizes=groups, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*FORMATS, *TABLES])
def test_products_of_any_number_of_rows_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    layer = _layer({**FORMATS, **TABLES}[name], dtype)
    dense = layer.dense().double()
    for rows in (1, 2, 3, 8, 17, 33, 64, 65, 256):
        x = torch.randn(rows, layer.in_features, device="cuda").to(dtype)
        exact = x.double() @ dense.T
        tolerance = max(3 * torch.finfo(dtype).eps, 1e-5)
        assert (layer(x).double() - exact).norm() <= tolerance * exact.norm(), rows
        assert torch.equal(layer(x), layer(x)), rows


@pytest.mark.gpu
def test_a_captured_graph_gives_the_same_on_a_gpu() -> None:
    layer = _layer(Integer(), torch.bfloat16)
    for rows in (1, 16, 100):
        x = torch.randn(rows, layer.in_features, device="cuda", dtype=torch.bfloat16)
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


def _layer(format: Format, dtype: torch.dtype) -> PackedLinear:
    """Return a packed layer of random words on the GPU."""
    layer = PackedLinear(1040, 520, bias=False, format=format, format_name="any", option=Option(3, 64), dtype=dtype)
    for name, tensor in _random_tensors(format, layer.option, (520, 1040)).items():
        layer.get_buffer(name).copy_(tensor)
    if getattr(format, "code", None) == "fp":  # of which one code has no level
        layer.qweight.zero_()
    layer = layer.cuda()
    layer.select_backend("triton")
    return layer


def _random_tensors(format: Format, option: Option, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Return tensors as a format stores them, each bit of codes at random; a unit of scales is 1/64."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (size, dtype) in format.packed_layout(option, shape).items():
        if dtype == torch.int32:
            tensors[name] = torch.randint(-(2**31), 2**31, size, generator=generator).to(dtype)
        elif dtype == torch.uint8:  # 176 to 240 in e4m3, in e8m0 2^-12 to 2^-8
            tensors[name] = torch.randint(115, 120, size, generator=generator).to(dtype)
        else:
            tensors[name] = torch.rand(size, generator=generator).to(dtype) + 0.01
    return tensors | ({"scale_unit": torch.tensor([1 / 64])} if "scale_unit" in tensors else {})
