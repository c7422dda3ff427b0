"""Rounding a table, and what stands in for a model's modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from aptq.api import AptqError, Curvature, Option
from aptq.calibration import embedding as module
from aptq.calibration.embedding import TableCoding, packed_modules, round_table
from aptq.calibration.walk import Walk
from aptq.embedding import PackedEmbedding
from aptq.formats.integer import Integer
from aptq.layer import PackedLinear
from aptq.models import ModelSource, open_model
from aptq.quantizers.gptq import GPTQ
from aptq.quantizers.nearest import Nearest
from aptq.settings import ModelSettings

FORMAT = Integer(group_size=32)
FABRIC = Fabric(accelerator="cpu", devices=1)


def _coding(bits: int) -> TableCoding:
    option = Option(bits, 32, "integer")
    return TableCoding(format=FORMAT, option=option, config={"name": "integer"}, quantizer=GPTQ())


def _source(folder: Path) -> ModelSource:
    return open_model(ModelSettings(path=str(folder), quantize_embeddings=3))


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("rows", [32, 100, 4096])
def test_parts_of_a_table_are_rounded_as_the_whole(bits: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(261, 72, generator=torch.Generator().manual_seed(0))
    nearest, option = Nearest(), Option(bits, 32)
    factors = nearest.prepare(Curvature(column=torch.eye(72)[None], tokens=1))
    expected = FORMAT.pack(nearest.quantize(table, factors, FORMAT, option).weight, option)
    monkeypatch.setattr(module, "_ROWS", rows)
    found = round_table(table, _coding(bits), None, torch.device("cpu"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_table_with_a_curvature_is_rounded_by_the_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    table, states = torch.randn(261, 72), torch.randn(300, 72) @ torch.randn(72, 72)
    curvature, option = Curvature(column=2 * (states.T @ states)[None] / 300, tokens=300), Option(3, 32)
    whole = GPTQ().quantize(table, GPTQ().prepare(curvature), FORMAT, option).weight
    monkeypatch.setattr(module, "_ROWS", 100)
    found, nearest = (round_table(table, _coding(3), each, torch.device("cpu")) for each in (curvature, None))
    values = [FORMAT.dequantize(FORMAT.unpack(each, option, table.shape), option) for each in (found, nearest)]
    assert (values[0] == FORMAT.dequantize(whole, option)).float().mean() > 0.98, "but for ties of float32"
    assert curvature.quadratic(table - values[0]) < 0.5 * curvature.quadratic(table - values[1])


def test_a_table_that_cannot_be_stored_is_refused(tiny_model_folder: Callable[..., Path]) -> None:
    source = _source(tiny_model_folder("llama"))
    assert source.embedding is not None
    source.embedding.table[7, 3] = float("nan")
    with pytest.raises(AptqError, match=r"model\.embed_tokens cannot be stored at 3 bits.*not finite"):
        packed_modules(source, _coding(3), FABRIC)


@pytest.mark.parametrize("family", ["llama", "llama_untied", "gemma3", "gpt2"])
def test_the_walk_begins_and_ends_with_the_packed_modules(family: str, tiny_model_folder: Callable[..., Path]) -> None:
    def end(walk: Walk, **how: bool) -> tuple[Tensor, Tensor]:
        first = None
        for step in walk.blocks(**how):
            seen = step if step.full_precision is None else step.full_precision
            first = seen.inputs[0].hidden if first is None else first
            step.run()
            if step.full_precision is not None:
                step.full_precision.run()
        assert first is not None
        return first, walk.logits()

    source = _source(tiny_model_folder(family))
    assert source.embedding is not None
    samples = torch.randint(4, 260, (2, 32), generator=torch.Generator().manual_seed(0))
    plain = Walk(source, samples, 1, FABRIC)
    modules = packed_modules(source, _coding(3), FABRIC)
    assert isinstance(modules[source.embedding.name], PackedEmbedding)
    assert [type(each) for each in modules.values()][1:] == [PackedLinear] * (family != "llama_untied")
    before = end(plain)
    found = end(plain.between(modules))
    dense = {name: each.stored() for name, each in modules.items() if isinstance(each, PackedEmbedding)}
    original = end(plain.between(modules), full_precision=True)[0]
    assert torch.equal(original, before[0]), "what travels beside is the full-precision model's"
    assert torch.equal(end(plain)[1], before[1]), "the model is as it was"
    source.embedding.table.copy_(dense[source.embedding.name])
    expected = end(plain)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[1], before[1], atol=1e-2)
    assert torch.equal(
        plain.between(modules).beginning(1).outside[source.embedding.name].scales, modules[source.embedding.name].scales
    )
