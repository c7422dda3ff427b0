"""The teacher's text: seeded, masked behind its end, kept on disk and taken up again."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from aptq.api import AptqError
from aptq_bitdistiller.text import TextSettings, generated, given, order

SETTINGS = TextSettings(samples=5, length=24, prompt_length=8, batch_size=2, temperature=1.0)


@pytest.fixture
def prompts() -> torch.Tensor:
    return torch.randint(1, 257, (5, 8), generator=torch.Generator().manual_seed(0))


def test_continues_prompts_by_the_seed_and_goes_on_where_it_stopped(
    model_folder: Path, prompts: torch.Tensor, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    told: list[int] = []
    text = generated(model, prompts, SETTINGS, None, tmp_path / "a", told.append)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert text.tokens.shape == (5, 24)
    assert torch.equal(text.tokens[:, :8], prompts)
    assert told == [2, 4, 5]
    assert bool(text.mask.all())

    (tmp_path / "a" / "00001.safetensors").write_bytes(b"cut off")
    with torch.no_grad():
        first = model.model.embed_tokens.weight[:] * 0  # a model that would write something else
    again = generated(model, prompts, SETTINGS, None, tmp_path / "a", told.append)
    assert torch.equal(again.tokens, text.tokens)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(first)
    kept = generated(model, prompts, SETTINGS, None, tmp_path / "a", told.append)
    assert torch.equal(kept.tokens, text.tokens)


def test_what_lies_behind_the_end_does_not_count(model_folder: Path, prompts: torch.Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    free = generated(model, prompts, SETTINGS, None, tmp_path / "free", lambda _: None)
    end = int(free.tokens[0, 12])  # a token that the teacher writes
    prompts[0, 2] = end  # one in a prompt ends nothing
    text = generated(model, prompts, SETTINGS, end, tmp_path / "ended", lambda _: None)
    assert bool(text.mask[:, :9].all())
    for row, mask in zip(text.tokens, text.mask, strict=True):
        stops = [at for at in range(8, 24) if row[at] == end]
        assert mask.sum() == (stops[0] + 1 if stops else 24)
    assert torch.equal(text.predicted(), text.mask[:, 1:])
    assert torch.equal(text.written()[:, 7:], text.mask[:, 8:])
    assert not text.written()[:, :7].any()


def test_given_text_counts_as_a_whole() -> None:
    text = given(torch.arange(12).view(2, 6))
    assert bool(text.written().all())
    assert text.written().shape == (2, 5)


def test_every_pass_has_all_samples_in_another_order() -> None:
    found = list(islice(order(6, seed=1), 18))
    passes = [found[:6], found[6:12], found[12:]]
    assert all(sorted(each) == list(range(6)) for each in passes)
    assert passes[0] != passes[1]
    assert found == list(islice(order(6, seed=1), 18))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "text.samples=0"),
        ({"prompt_length": 256}, "1 to text.length - 1"),
        ({"temperature": 0.0}, "text.temperature"),
    ],
)
def test_settings_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(AptqError, match=message):
        TextSettings(**options)  # type: ignore[arg-type]
