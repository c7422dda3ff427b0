"""Which table tokens are looked up in, and who shares it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from aptq.api import AptqError
from aptq.models import open_model
from aptq.models.embedding import find_embedding
from aptq.settings import ModelSettings

Make = Callable[..., Path]


def _model(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("family", "name", "head", "scale"),
    [
        ("llama", "model.embed_tokens", "lm_head", None),
        ("llama_untied", "model.embed_tokens", None, None),
        ("gemma3", "model.embed_tokens", "lm_head", 8.0),
        ("opt", "model.decoder.embed_tokens", "lm_head", None),
        ("gpt2", "transformer.wte", "lm_head", None),
        ("phi", "model.embed_tokens", None, None),
    ],
)
def test_the_embedding_of_a_family(
    family: str, name: str, head: str | None, scale: float | None, tiny_model_folder: Make
) -> None:
    model = _model(tiny_model_folder(family))
    found = find_embedding(model, set())
    assert (found.name, found.head, found.scale, found.shape) == (name, head, scale, (260, 64))
    assert found.num_bytes == 260 * 64 * 4
    assert torch.equal(found.table, model.get_input_embeddings().weight)  # type: ignore[no-untyped-call]
    assert find_embedding(model, {"lm_head"}).head is None, "a head that is quantized by itself is not tied"


@pytest.mark.parametrize("family", ["llama", "llama_untied", "gpt2"])
@pytest.mark.parametrize("quantize_head", [False, True])
def test_what_stays_as_it_is_leaves_the_table_out(family: str, quantize_head: bool, tiny_model_folder: Make) -> None:
    how: dict[str, Any] = {"path": str(tiny_model_folder(family)), "quantize_head": quantize_head}
    plain, source = open_model(ModelSettings(**how)), open_model(ModelSettings(**how, quantize_embeddings=8))
    assert plain.embedding is None
    assert source.embedding is not None
    assert plain.other_bytes - source.other_bytes == 260 * 64 * 4
    assert (source.embedding.head is not None) == (family != "llama_untied" and not quantize_head)
    names, others = ({name for name, _ in each.other_tensors()} for each in (plain, source))
    assert names - others == {f"{source.embedding.name}.weight"}
    assert others < names
    assert source.other_bytes == sum(each.numel() * each.element_size() for _, each in source.other_tensors())


def test_a_head_that_is_skipped_stays_tied(tiny_model_folder: Make) -> None:
    how: dict[str, Any] = {"quantize_head": True, "skip": ["lm_head"], "quantize_embeddings": 8}
    source = open_model(ModelSettings(path=str(tiny_model_folder("llama")), **how))
    assert source.head_name is None
    assert source.num_steps == 3
    assert source.embedding is not None
    assert source.embedding.head == "lm_head"


class _Doubled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _doubled(model: Any) -> None:
    model.set_input_embeddings(_Doubled(260, 64))
    model.lm_head = nn.Linear(64, 260)


def _bounded(model: Any) -> None:
    model.get_input_embeddings().max_norm = 1e9


def _no_embedding(model: Any) -> None:
    model.set_input_embeddings(nn.Linear(260, 64))


def _shared(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight = model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_doubled, "a _Doubled, does more than to look rows up and to scale them"),
        (_bounded, "does more than to look rows up"),
        (_no_embedding, r"has no nn.Embedding for tokens \(it has Linear\)"),
        (_shared, "shares its table with .*up_proj"),
    ],
)
def test_other_structures_are_refused(change: Callable[[Any], None], message: str, tiny_model_folder: Make) -> None:
    model = _model(tiny_model_folder("llama"))
    change(model)
    with pytest.raises(AptqError, match=f"model.quantize_embeddings: .*{message}.*leave model.quantize_embeddings out"):
        find_embedding(model, set())
