import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from aptq.api import AptqError
from aptq.data import calibration_samples, check_length, evaluation_texts
from aptq.settings import DataSettings


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a byte, which begins a text with token 0 and has a short context."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={"<s>": 0} | {byte: i for i, byte in enumerate(alphabet, 1)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", model_max_length=16)


def documents(path: Path, count: int, words: int = 30) -> Path:
    rows = [{"text": " ".join(f"d{index}w{word}" for word in range(words))} for index in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def settings(path: Path, **options: Any) -> DataSettings:
    return DataSettings(source="text", **({"path": str(path), "num_samples": 4, "sequence_length": 64} | options))


def test_samples_have_one_length_and_are_passages_of_the_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = documents(tmp_path / "a.jsonl", count=40)
    samples = calibration_samples(settings(path, num_samples=5, sequence_length=300), tokenizer)
    assert samples.shape == (5, 300)
    assert samples.dtype == torch.int64
    assert not (samples == 0).any()  # neither padding nor the token that begins a text
    whole = tokenizer.decode(samples.flatten())
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    parts = whole.split("\n\n")
    assert all(part in texts for part in parts[:-1])
    assert texts[int(parts[-1][1 : parts[-1].index("w")])].startswith(parts[-1])
    assert len(set(parts)) == len(parts)


def test_the_seed_decides(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = documents(tmp_path / "a.jsonl", count=40)
    first, again, other = (calibration_samples(settings(path, seed=seed), tokenizer) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    more = calibration_samples(settings(path, num_samples=60), tokenizer)  # reads far more of the same order
    assert torch.equal(more[:4], first)


def test_the_order_is_the_same_on_every_platform(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = documents(tmp_path / "a.jsonl", count=9)
    samples = calibration_samples(settings(path, num_samples=20, sequence_length=40), tokenizer)
    order = [part[: part.index("w")] for part in tokenizer.decode(samples.flatten()).split("\n\n")]
    assert order == ["d3", "d7", "d5", "d2", "d8"]  # by Random(0).random(), whose values Python promises to keep


def test_lines_of_a_text_stay_together(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {index:04}\n" for index in range(500)), encoding="utf-8")
    samples = calibration_samples(settings(path, num_samples=8, sequence_length=100), tokenizer)
    numbers = [int(line[5:]) for line in tokenizer.decode(samples.flatten()).split("\n") if len(line) == 9]
    follows = sum(after == before + 1 for before, after in zip(numbers, numbers[1:], strict=False))
    assert follows > 0.9 * len(numbers)
    assert numbers != sorted(numbers)


def test_all_of_a_text_can_be_asked_for(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = documents(tmp_path / "a.jsonl", count=1)
    length = len(json.loads(path.read_text(encoding="utf-8"))["text"]) + 2  # and the blank line after it
    assert calibration_samples(settings(path, num_samples=1, sequence_length=length), tokenizer).shape == (1, length)
    with pytest.raises(AptqError, match=f"has {length} tokens, .* need {length + 1}"):
        calibration_samples(settings(path, num_samples=1, sequence_length=length + 1), tokenizer)


def test_text_that_is_too_short_says_what_would_fit(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 98, encoding="utf-8")
    with pytest.raises(
        AptqError, match=r"has 100 tokens, data.num_samples=4 of .*=30 need 120.* data.num_samples=3 or"
    ):
        calibration_samples(settings(path, sequence_length=30), tokenizer)
    with pytest.raises(AptqError, match=r"less than one sample.* data.sequence_length=100 or less"):
        calibration_samples(settings(path, sequence_length=101), tokenizer)


def test_only_what_is_needed_is_tokenized(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    class Counting:
        characters = 0

        def __call__(self, text: str, **options: Any) -> Any:
            self.characters += len(text)
            return tokenizer(text, **options)

    path = tmp_path / "a.txt"
    path.write_text("some words and no end " * 20_000, encoding="utf-8")
    counting: Any = Counting()
    with caplog.at_level(logging.WARNING):
        assert calibration_samples(settings(path), counting).shape == (4, 64)
        assert len(evaluation_texts(settings(path, evaluation_path=str(path)), counting, 256)[0].tokens) == 256
    assert counting.characters < 40_000
    assert not caplog.records  # no "sequence is longer than the model's maximum"


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_evaluation_tokens_are_the_beginning_of_the_whole(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, suffix: str
) -> None:
    path = documents(tmp_path / "a.jsonl", count=100)
    joined = "\n\n".join(json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines())
    if suffix == ".txt":
        path = tmp_path / "a.txt"
        path.write_text(joined, encoding="utf-8")
    options = settings(path, evaluation_path={"mine": str(path)})
    (whole,) = evaluation_texts(options, tokenizer, None)
    assert whole.name == "mine"
    assert whole.tokens.dtype == torch.int64
    assert whole.tokens.tolist() == tokenizer(joined, verbose=False)["input_ids"]
    assert whole.tokens[0] == 0  # what the tokenizer begins a text with, once
    for count in (1, 500, 5000, 10**6):
        (text,) = evaluation_texts(options, tokenizer, count)
        assert torch.equal(text.tokens, whole.tokens[:count])


def test_empty_evaluation_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n", encoding="utf-8")
    for count in (None, 10):
        with pytest.raises(AptqError, match="The evaluation text 'a' is empty"):
            evaluation_texts(settings(path, evaluation_path=str(path)), tokenizer, count)


def test_hub_and_pydoc(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = {"path": "json", "data_files": str(documents(tmp_path / "a.jsonl", 40)), "split": "train", "streaming": True}
    hub = DataSettings(source="hub", num_samples=4, sequence_length=64, hub=rows, evaluation_hub={"mine": rows})
    assert torch.equal(
        calibration_samples(hub, tokenizer), calibration_samples(settings(tmp_path / "a.jsonl"), tokenizer)
    )
    assert [(text.name, len(text.tokens)) for text in evaluation_texts(hub, tokenizer, 99)] == [("mine", 99)]
    pydoc = DataSettings(source="pydoc", num_samples=4, sequence_length=64)
    assert calibration_samples(pydoc, tokenizer).shape == (4, 64)
    assert [(text.name, len(text.tokens)) for text in evaluation_texts(pydoc, tokenizer, 99)] == [("pydoc", 99)]


def test_samples_longer_than_the_model_reads() -> None:
    check_length(DataSettings(source="pydoc", sequence_length=512), 512)
    check_length(DataSettings(source="pydoc", sequence_length=512), None)
    with pytest.raises(AptqError, match=r"data.sequence_length=513 is more than the 512 positions"):
        check_length(DataSettings(source="pydoc", sequence_length=513), 512)
