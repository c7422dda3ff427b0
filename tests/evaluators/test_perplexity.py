import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, PreTrainedModel

from aptq.api import AptqError, EvaluationText, Evaluator
from aptq.evaluators import perplexity
from aptq.evaluators.perplexity import Perplexity

SIZES: dict[str, int] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),  # changes logits after the head
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5),
}


def build(family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():  # far from uniform, so that a wrong count shows
        model.get_output_embeddings().weight.mul_(20)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build()


@pytest.fixture(scope="module")
def text() -> EvaluationText:
    return EvaluationText(name="mine", tokens=torch.randint(97, (333,), generator=torch.Generator().manual_seed(1)))


def measure(evaluator: Perplexity, model: PreTrainedModel, text: EvaluationText) -> float:
    return evaluator.evaluate(model, [text], lambda name, share: None)["perplexity"][text.name]


@torch.no_grad()
def token_losses(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[None]).logits[0]
    return nn.functional.cross_entropy(logits[:-1].double(), tokens[1:], reduction="none")


@pytest.mark.parametrize("family", list(CONFIGS))
def test_equals_the_loss_of_the_model_itself(family: str, text: EvaluationText) -> None:
    model = build(family)
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in text.tokens.split(32)[:-1]]
    assert measure(Perplexity(sequence_length=32), model, text) == pytest.approx(
        math.exp(sum(losses) / len(losses)), rel=1e-6
    )


def test_uniform_prediction_has_the_perplexity_of_the_vocabulary(text: EvaluationText) -> None:
    model = build()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert measure(Perplexity(sequence_length=32), model, text) == pytest.approx(97, rel=1e-6)


@pytest.mark.parametrize("stride", [1, 10, 31, 32])
def test_stride_counts_every_new_token_once(model: PreTrainedModel, text: EvaluationText, stride: int) -> None:
    tokens, losses = text.tokens[:60], []
    for start in range(0, len(tokens) - 32 + 1, stride):
        window = token_losses(model, tokens[start : start + 32])
        losses.append(window if start == 0 else window[-stride:])
    expected = torch.cat(losses).mean().exp().item()
    evaluator = Perplexity(sequence_length=32, stride=stride)
    shorter = EvaluationText(name="mine", tokens=tokens)
    assert measure(evaluator, model, shorter) == pytest.approx(expected, rel=1e-6)


def test_stride_of_a_whole_window_is_the_default(model: PreTrainedModel, text: EvaluationText) -> None:
    assert measure(Perplexity(32, stride=32), model, text) == measure(Perplexity(32), model, text)


@pytest.mark.parametrize("stride", [None, 8])
def test_batches_and_chunks_of_the_head_do_not_matter(
    model: PreTrainedModel, text: EvaluationText, stride: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = measure(Perplexity(32, stride, batch_size=1), model, text)
    assert measure(Perplexity(32, stride, batch_size=7), model, text) == pytest.approx(one, rel=1e-6)
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 500)
    assert measure(Perplexity(32, stride, batch_size=7), model, text) == pytest.approx(one, rel=1e-6)


def test_number_of_sequences(model: PreTrainedModel, text: EvaluationText) -> None:
    evaluator = Perplexity(32, stride=8, num_sequences=3)
    assert evaluator.max_tokens == 48
    enough = EvaluationText(name="mine", tokens=text.tokens[:48])
    assert (
        measure(evaluator, model, text)
        == measure(evaluator, model, enough)
        == measure(Perplexity(32, stride=8), model, enough)
    )
    assert Perplexity(32, num_sequences=3).max_tokens == 96
    assert Perplexity(32).max_tokens is None
    assert measure(Perplexity(32, num_sequences=99), model, text) == measure(Perplexity(32), model, text)


def test_progress_and_several_texts(model: PreTrainedModel, text: EvaluationText) -> None:
    calls: list[tuple[str, float]] = []
    other = EvaluationText(name="other", tokens=text.tokens.flip(0)[:64])
    evaluator = Perplexity(32, batch_size=4)
    assert isinstance(evaluator, Evaluator)
    results = evaluator.evaluate(model, [text, other], lambda *call: calls.append(call))
    assert list(results) == ["perplexity"]
    assert list(results["perplexity"]) == ["mine", "other"]
    assert calls == [("mine", 0.4), ("mine", 0.8), ("mine", 1.0), ("other", 1.0)]


def test_the_model_is_left_as_it_was(text: EvaluationText) -> None:
    model = build("gpt2")
    expected = measure(Perplexity(32), model, text)
    model.train()
    model.get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]
    assert measure(Perplexity(32), model, text) == expected  # without dropout
    assert [module.training for module in model.modules()] == modes
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_low_precision_is_computed_as_the_model_does(text: EvaluationText) -> None:
    model = build().to(torch.bfloat16)
    losses = [token_losses(model, window).mean() for window in text.tokens.split(32)[:-1]]
    expected = torch.stack(losses).mean().exp().item()
    assert measure(Perplexity(32), model, text) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_nan_names_the_text(family: str, text: EvaluationText) -> None:
    model = build(family).train()
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = math.nan
    with pytest.raises(AptqError, match=r"no finite likelihood on the text 'mine' \(windows 0 to 3\)"):
        measure(Perplexity(32), model, text)
    assert model.training
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_text_and_windows_that_do_not_fit(model: PreTrainedModel, text: EvaluationText) -> None:
    short = EvaluationText(name="short", tokens=text.tokens[:31])
    calls: list[Any] = []
    with pytest.raises(AptqError, match=r"'short' has 31 tokens, less than one window .*=32"):
        Perplexity(32).evaluate(model, [text, short], lambda *call: calls.append(call))
    assert not calls  # nothing was lost on the texts before it
    with pytest.raises(AptqError, match="evaluator.sequence_length=65 is more than the 64 positions"):
        measure(Perplexity(65), model, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1}, "evaluator.sequence_length=1: allowed are whole numbers from 2"),
        ({"stride": 0}, "evaluator.stride=0: allowed are 1 to evaluator.sequence_length=2048"),
        ({"stride": 4096}, "evaluator.stride=4096"),
        ({"num_sequences": 0}, "evaluator.num_sequences=0"),
        ({"batch_size": 0}, "evaluator.batch_size=0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, int], message: str) -> None:
    with pytest.raises(AptqError, match=message):
        Perplexity(**options)
