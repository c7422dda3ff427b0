"""Models that run on the kernels: loaded, compiled, generating."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import aptq
from aptq.api import Option
from aptq.formats.integer import Integer
from aptq.layer import PackedLinear


@pytest.fixture(scope="module")
def checkpoint(tiny_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    text = folder / "text.txt"
    text.write_text("A page of any text, which says nothing at all. " * 80)
    run = aptq.quantize(
        [
            *(f"model.path={tiny_model_folder('llama')}", "data=text", f"data.path={text}", "evaluator=none"),
            *("data.num_samples=2", "data.sequence_length=32", "format.group_size=32", "allocator=uniform"),
            *("allocator.bits=3", "quantizer=nearest", "fabric=cpu", "baseline=false", "samples=0", "callback=none"),
            *(f"run.dir={folder / 'run'}", f"cache_dir={folder / 'cache'}"),
        ]
    )
    return run.folder / "model"


def test_a_checkpoint_generates_the_same_text_by_either_backend(checkpoint: Path) -> None:
    ids = torch.tensor([[1, 5, 9, 40, 7]])
    texts = {}
    for backend in ("cpu", "reference", {"name": "cpu", "architecture": "native"}):
        model = aptq.load(checkpoint, backend=backend)
        names = {layer.choice.name for layer in model.modules() if isinstance(layer, PackedLinear)}
        assert names == {"reference" if backend == "reference" else "cpu"}
        generated = model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        texts[str(backend)] = generated.tolist()
    assert len({str(text) for text in texts.values()}) == 1


def test_auto_takes_the_kernels(checkpoint: Path) -> None:
    model = aptq.load(checkpoint)
    assert all(each.choice.name == "cpu" for each in model.modules() if isinstance(each, PackedLinear))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_layer_has_no_graph_break() -> None:
    layer = PackedLinear(96, 40, bias=True, format=Integer(group_size=32), format_name="integer", option=Option(4, 32))
    generator = torch.Generator().manual_seed(0)
    layer.qweight.random_(-(2**31), 2**31 - 1, generator=generator)
    layer.scales.fill_(0.01)
    layer.select_backend("cpu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.inference_mode():
        for leading in ((3,), (2, 5)):
            x = torch.randn(*leading, 96, generator=generator)
            assert torch.equal(compiled(x), layer(x))
