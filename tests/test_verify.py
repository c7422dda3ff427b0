"""What the exporter wrote is looked at before it gets its name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import aptq
from aptq.api import AptqError, ExportJob
from aptq.exporters.native import Native
from aptq.verify import verify

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def arguments(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i}. The quick brown fox jumps over the lazy dog, being lazy." for i in range(99)))
    data = ["data=text", f"data.path={text}", "data.num_samples=2", "data.sequence_length=48", "evaluator=none"]
    where = [f"cache_dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}", "fabric=cpu", "callback=none"]
    return [f"model.path={tiny_model_folder('llama')}", *data, *where, "format.group_size=32", "allocator=uniform"]


def _flip(tensors: Tensors) -> None:
    tensors["model.layers.2.mlp.down_proj.qweight"] ^= 0x0F0F0F0F


def _scale(tensors: Tensors) -> None:
    tensors["model.layers.0.input_layernorm.weight"] *= 1.0001


def _drop(tensors: Tensors) -> None:
    del tensors["model.norm.weight"]


def _add(tensors: Tensors) -> None:
    tensors["model.layers.3.mlp.down_proj.qweight"] = torch.zeros(1)


@pytest.mark.parametrize("prefix", ["quantized", "full_precision"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "logits differ"),
        (_scale, "input_layernorm.weight in the written model is not what it was"),
        (_drop, r"lacks \['model.norm.weight'\]"),
        (_add, r"has \['model.layers.3.mlp.down_proj.qweight'\] too many"),
    ],
)
def test_a_damaged_checkpoint_does_not_become_the_model(
    damage: Callable[[Tensors], None],
    message: str,
    prefix: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [*arguments, f"prefix={prefix}"]
    export = Native.export

    def damaged(self: Native, job: ExportJob, folder: Path) -> None:
        export(self, job, folder)
        tensors = load_file(folder / "model.safetensors")
        damage(tensors)
        save_file(tensors, folder / "model.safetensors")

    monkeypatch.setattr(Native, "export", damaged)
    with pytest.raises(AptqError, match=message):
        aptq.quantize(arguments)
    monkeypatch.undo()
    run = aptq.quantize(arguments)  # the blocks were kept: only the export is done again
    assert run.model_folder.is_dir()


@pytest.mark.parametrize("prefix", ["quantized", "full_precision"])
def test_the_check_leaves_the_model_as_it_was(
    prefix: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def twice(folder, walk, expected, backend):  # type: ignore[no-untyped-def]
        before = walk.logits()
        seen.append(verify(folder, walk, expected, backend))
        seen.append(verify(folder, walk, expected, backend))
        assert torch.equal(walk.logits(), before)
        return seen[-1]

    monkeypatch.setattr("aptq.pipeline.verify", twice)
    aptq.quantize([*arguments, "model.quantize_head=true", f"prefix={prefix}"])
    assert seen[0] == seen[1] < 1e-4
