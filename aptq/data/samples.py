"""From text to tokens: calibration samples of one exact length, and evaluation texts.

Documents are parted by a blank line, in calibration and evaluation alike. Not by the end-of-text token: what a
tokenizer calls so is often the end of a chat turn, a special token in mid-sample draws the large activations of an
attention sink, which would weigh heavily in every Hessian, and the perplexities of the literature are of text joined
like this (GPTQ's WikiText-2 protocol).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aptq.api import EvaluationText
from aptq.data.files import SEPARATOR
from aptq.data.sources import calibration_text, evaluation_texts_by_name
from aptq.errors import AptqError
from aptq.settings import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS_PER_TOKEN = 8  # a first guess on the safe side; where it is too low, more is read
STREAM_FACTOR = 32  # of a data set on the hub, at most this many times the text that is needed is shuffled
MARGIN = 256  # tokens this far from where a text was cut are those of the whole text


def check_length(settings: DataSettings, max_positions: int | None) -> None:
    """Raise ``AptqError`` when samples are longer than the model can read; ``None`` is a model without a limit."""
    if max_positions is not None and settings.sequence_length > max_positions:
        raise AptqError(
            f"data.sequence_length={settings.sequence_length} is more than the {max_positions} positions of the model. "
            f"Set data.sequence_length={max_positions} or less."
        )


def calibration_samples(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return calibration samples ``[num_samples, sequence_length]``, int64.

    Documents and paragraphs shorter than a sample are gathered with their neighbours into passages about as long as
    one; passages are shuffled by the seed and tokenized one by one, without special tokens, until there is enough;
    what they give together is cut into consecutive samples, without padding. The same settings give the same samples
    on every platform.

    Raises:
        AptqError: the text is shorter than what is asked for.
    """
    needed = settings.num_samples * settings.sequence_length
    size = needed * CHARACTERS_PER_TOKEN
    while True:
        text = calibration_text(settings)
        if settings.source == "hub":  # may be too long to read to its end
            text = _first(text, STREAM_FACTOR * size)
        passages, complete = _shuffled(_passages(text, 4 * settings.sequence_length), settings.seed, size)
        tokens: list[int] = []
        for passage in passages:
            tokens += _leading(tokenizer, passage + SEPARATOR, needed - len(tokens), special=False)
            if len(tokens) >= needed:
                return torch.tensor(tokens, dtype=torch.int64).reshape(settings.num_samples, -1)
        if complete:
            raise _too_short(settings, len(tokens))
        size *= 4


def evaluation_texts(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None
) -> list[EvaluationText]:
    """Return every evaluation text, tokenized as one (the GPTQ protocol).

    Args:
        settings: what to read.
        tokenizer: the model's; it adds the special tokens that it adds by default.
        max_tokens: how many tokens of each text are needed; all of them when ``None``. Only about as much text as
            that takes is read, and the tokens are those that the whole text begins with.

    Raises:
        AptqError: a text has no tokens, or cannot be read.
    """
    texts = []
    for name, pieces in evaluation_texts_by_name(settings).items():
        tokens = _leading_of_pieces(tokenizer, pieces, max_tokens)
        if not tokens:
            raise AptqError(f"The evaluation text {name!r} is empty. Give one with text in it.")
        texts.append(EvaluationText(name=name, tokens=torch.tensor(tokens, dtype=torch.int64)))
    return texts


def _passages(pieces: Iterable[str], length: int) -> Iterator[str]:
    """Yield consecutive pieces joined until they have ``length`` characters; those with no text are dropped."""
    gathered: list[str] = []
    size = 0
    for piece in pieces:
        if piece.strip():
            gathered.append(piece)
            size += len(piece)
            if size >= length:
                yield "".join(gathered).strip("\n")
                gathered, size = [], 0
    if gathered:
        yield "".join(gathered).strip("\n")


def _shuffled(passages: Iterable[str], seed: int, size: int) -> tuple[list[str], bool]:
    """Return the beginning of a random order of the passages, at least ``size`` characters of it where there are.

    Each passage draws a key, and those with the lowest are kept: one pass, with memory for what is returned only, and
    a larger ``size`` prolongs what a smaller one gives. The second value says whether that is every passage.
    """
    random = Random(seed)
    kept: list[tuple[float, int, str]] = []
    total, complete = 0, True
    for index, passage in enumerate(passages):
        heapq.heappush(kept, (-random.random(), index, passage))
        total += len(passage)
        while total - len(kept[0][2]) >= size:
            total -= len(heapq.heappop(kept)[2])
            complete = False
    return [passage for _, _, passage in sorted(kept, reverse=True)], complete


def _first(pieces: Iterable[str], size: int) -> Iterator[str]:
    """Yield pieces until they have ``size`` characters."""
    for piece in pieces:
        yield piece
        size -= len(piece)
        if size <= 0:
            return


def _leading_of_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Iterator[str], count: int | None) -> list[int]:
    """Return the first ``count`` tokens of a text, reading no more of it than that takes."""
    if count is None:
        text = "".join(pieces)
        return _tokenize(tokenizer, text, special=True) if text.strip() else []
    text, size = "", (count + MARGIN) * CHARACTERS_PER_TOKEN
    while True:
        more = "".join(_first(pieces, size))
        text += more
        ended = len(more) < size
        tokens = _leading(tokenizer, text, count + MARGIN, special=True) if text.strip() else []
        if ended or len(tokens) >= count + MARGIN:
            return tokens[:count]
        size *= 2


def _leading(tokenizer: PreTrainedTokenizerBase, text: str, count: int, *, special: bool) -> list[int]:
    """Return the first ``count`` tokens of a text, or all where there are fewer, without tokenizing much more."""
    size = (count + MARGIN) * CHARACTERS_PER_TOKEN
    while size < len(text):
        tokens = _tokenize(tokenizer, text[:size], special=special)
        if len(tokens) >= count + MARGIN:
            return tokens[:count]
        size *= 2
    return _tokenize(tokenizer, text, special=special)[:count]


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    # verbose=False: that a whole text is longer than the model's context is meant so.
    tokens: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return tokens


def _too_short(settings: DataSettings, found: int) -> AptqError:
    num_samples, length = settings.num_samples, settings.sequence_length
    asked = f"data.num_samples={num_samples} of data.sequence_length={length} need {num_samples * length}"
    if found < length:
        advice = f"That is less than one sample: give more text, or set data.sequence_length={found} or less"
        advice = advice if found else "Give text"
    else:
        advice = f"Give more text, or set data.num_samples={found // length} or less"
    return AptqError(f"The calibration text has {found} tokens, {asked}. {advice}.")
