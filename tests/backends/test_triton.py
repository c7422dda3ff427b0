from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aptq import packing
from aptq.api import AptqError, Backend, Format, LayerSpec, Option
from aptq.backends.cpu import Cpu
from aptq.backends.select import choose_backend
from aptq.backends.triton import Triton
from aptq.formats.block_clustered import BlockClustered
from aptq.formats.float import Float
from aptq.formats.integer import Integer
from aptq.layer import PackedLinear
from aptq.testing import check_backend
from tests.backends.specs import FORMATS, spec_of

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
        (spec_of(BlockClustered(), Option(4, 64), (64, 128)), "cannot read scales of format anything"),
        (spec_of(Integer(), Option(8, 64), (1 << 19, 1 << 14)), "less than 2147483648 words"),
    ],
)
def test_layers_that_it_cannot_read(spec: LayerSpec, reason: str) -> None:
    assert reason in str(TRITON.refuses_layer(spec))


@pytest.mark.parametrize("group", [20, 48, 64, -1])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_layers_that_it_reads(format: Format, group: int) -> None:
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


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_conformance_on_a_gpu(format: Format) -> None:
    shapes = ((64, 128), (5, 33), (4096, 1024))
    check_backend(TRITON, format=format, bits=(2, 3, 4, 8), shapes=shapes, group_sizes=(32, 48, -1), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_products_of_any_number_of_rows_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    layer = _layer(FORMATS[name], dtype)
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
    layer.qweight.random_(-(2**31), 2**31 - 1, generator=torch.Generator().manual_seed(0))
    if format == FORMATS["fp"]:  # of which one code has no level
        layer.qweight.zero_()
    for name in layer.packed_names:
        if name.startswith("scales"):
            layer.get_buffer(name).uniform_(0.01, 1)
    layer = layer.cuda()
    layer.select_backend("triton")
    return layer
