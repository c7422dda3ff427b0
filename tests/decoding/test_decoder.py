from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, StaticCache, TextStreamer

import aptq
from aptq.api import AptqError
from tests.decoding.layers import packed_linear

PROMPT = torch.arange(6)[None] * 31 % 250 + 4


def packed(folder: Path) -> PreTrainedModel:
    """Load a model and pack its blocks' layers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.set_submodule(name, packed_linear(module.weight.detach(), 4))
    model.eval()
    return model


@pytest.fixture(scope="module")
def model(tiny_model_folder: Callable[..., Path]) -> PreTrainedModel:
    return packed(tiny_model_folder("llama"))


@pytest.fixture(scope="module")
def decoder(model: PreTrainedModel) -> aptq.Decoder:
    return aptq.Decoder(model, max_length=24)


def generate(model: PreTrainedModel, prompt: Tensor = PROMPT, **options: Any) -> Tensor:
    options = {"max_new_tokens": 10, "do_sample": False, **options}
    found: Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return found


@pytest.mark.parametrize("length", [6, 1, 14])
def test_greedy_tokens_are_those_of_the_model(model: PreTrainedModel, decoder: aptq.Decoder, length: int) -> None:
    prompt = torch.arange(length)[None] * 31 % 250 + 4
    assert torch.equal(generate(model, prompt, custom_generate=decoder), generate(model, prompt))


def test_logits_are_those_of_the_model(model: PreTrainedModel, decoder: aptq.Decoder) -> None:
    text = torch.cat([PROMPT, torch.tensor([[9, 200, 31]])], dim=1)
    found = [decoder.prefill(PROMPT), *(decoder.step(text[:, at : at + 1]) for at in range(6, 9))]
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(found, dim=1), model(text).logits[:, 5:], rtol=1e-4, atol=1e-4)


def test_sampling_draws_what_the_model_draws(model: PreTrainedModel, decoder: aptq.Decoder) -> None:
    options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.2}
    torch.manual_seed(3)
    own = generate(model, **options)
    torch.manual_seed(3)
    assert torch.equal(generate(model, custom_generate=decoder, **options), own)


def test_it_stops_and_streams_as_generate_does(
    model: PreTrainedModel,
    decoder: aptq.Decoder,
    tiny_model_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder("llama"))
    stop = int(generate(model)[0, 9])
    told = []
    for mine in ("streamer", "stream"):
        decoding = {mine: TextStreamer(tokenizer)} | ({"custom_generate": decoder} if mine == "stream" else {})
        found = generate(model, eos_token_id=stop, **decoding)
        assert found[0, -1] == stop
        told.append((found.tolist(), capsys.readouterr().out))
    assert told[0] == told[1]


def test_several_sequences(model: PreTrainedModel) -> None:
    decoder = aptq.Decoder(model, max_length=20, batch_size=2)
    prompts = torch.cat([PROMPT, PROMPT.flip(1)])
    stop = int(generate(model, prompts)[1, 8])  # one ends before the other
    options = {"eos_token_id": stop, "pad_token_id": 0}
    assert torch.equal(
        generate(model, prompts, custom_generate=decoder, **options), generate(model, prompts, **options)
    )
    with pytest.raises(AptqError, match="batch_size=1"):
        decoder.prefill(PROMPT)


@pytest.mark.parametrize("family", ["qwen3", "phi"])
def test_other_families(tiny_model_folder: Callable[..., Path], family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(family)).eval()
    decoder = aptq.Decoder(model, max_length=20)
    assert torch.equal(generate(model, custom_generate=decoder), generate(model))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_new_tokens": 19}, "Up to 25 tokens .* max_length is 24"),
        ({"num_beams": 2}, "num_beams is 2"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
    ],
)
def test_what_it_cannot_do_is_refused_before_any_work(
    model: PreTrainedModel, decoder: aptq.Decoder, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(AptqError, match=told):
        generate(model, custom_generate=decoder, **options)


def test_padded_sequences_used_caches_and_other_models_are_refused(
    model: PreTrainedModel, decoder: aptq.Decoder, tiny_model_folder: Callable[..., Path]
) -> None:
    mask = torch.ones_like(PROMPT)
    mask[0, 0] = 0
    with pytest.raises(AptqError, match="padded"):
        model.generate(PROMPT, attention_mask=mask, custom_generate=decoder, max_new_tokens=2)
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
    longer = torch.cat([PROMPT, PROMPT[:, :1]], dim=1)
    with pytest.raises(AptqError, match="whole prompt"):
        generate(model, longer, custom_generate=decoder, past_key_values=cache, max_new_tokens=2)
    other = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"))
    with pytest.raises(AptqError, match="another model"):
        generate(other, custom_generate=decoder)


def test_steps_beyond_its_length_are_refused(model: PreTrainedModel, decoder: aptq.Decoder) -> None:
    decoder.prefill(torch.cat([PROMPT] * 4, dim=1))
    with pytest.raises(AptqError, match="25 tokens are more than"):
        decoder.step(PROMPT[:, :1])
    with pytest.raises(AptqError, match="prefill first"):
        aptq.Decoder(model, max_length=24).step(PROMPT[:, :1])
    with pytest.raises(AptqError, match="max_length is 0"):
        aptq.Decoder(model, max_length=0)


@pytest.mark.parametrize(
    ("family", "told"),
    [("gemma3", "sliding window"), ("opt", "decides by its activations"), ("mixtral", "cannot be compiled")],
)
def test_models_whose_steps_are_not_alike_are_refused(
    tiny_model_folder: Callable[..., Path], family: str, told: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(family)).eval()
    with pytest.raises(AptqError, match=told):
        aptq.Decoder(model, max_length=20).prepare()


def test_a_model_that_counts_steps_itself_is_found_out(tiny_model_folder: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama")).eval()
    model.model.norm.register_forward_hook(lambda module, inputs, output: output * next(counts))
    counts = iter(range(1, 100))
    with pytest.raises(AptqError, match="keeps something between steps"):
        aptq.Decoder(model, max_length=20).prepare()


def test_a_model_without_weights_is_refused(tiny_model_folder: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama")).to("meta")
    with pytest.raises(AptqError, match="on meta"):
        aptq.Decoder(model, max_length=20)
