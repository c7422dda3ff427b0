"""Perplexity, by the protocol of GPTQ or with overlapping windows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptq.api import AptqError, EvaluationText
from aptq.evaluators.modes import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

LOGITS_AT_ONCE = 2**24  # elements of float32 logits: 64 MiB


@dataclass(frozen=True)
class Perplexity:
    """Judge a model by exp of its mean negative log-likelihood per token, over windows of ``sequence_length``.

    With ``stride=None`` windows follow each other and each predicts all its tokens but the first, which it has no
    context for: the protocol of GPTQ (arXiv 2210.17323) and of most papers after it. With a stride, windows overlap,
    each but the first predicts only the ``stride`` tokens that are new in it, and every token counts the same; closer
    to what the model can do, at ``sequence_length / stride`` times the cost. ``stride=sequence_length`` is the first
    protocol. Tokens at the end of a text that fill no window are left out.

    ``num_sequences`` limits the windows of each text; ``batch_size`` windows run at a time.
    """

    sequence_length: int = 2048
    stride: int | None = None
    num_sequences: int | None = None
    batch_size: int = 4

    def __post_init__(self) -> None:
        """Raise ``AptqError`` for options that no evaluation can serve."""
        if self.sequence_length < 2:
            raise AptqError(f"evaluator.sequence_length={self.sequence_length}: allowed are whole numbers from 2 on.")
        if self.stride is not None and not 1 <= self.stride <= self.sequence_length:
            raise AptqError(
                f"evaluator.stride={self.stride}: allowed are 1 to evaluator.sequence_length={self.sequence_length}, "
                "or null for windows that do not overlap."
            )
        if self.num_sequences is not None and self.num_sequences < 1:
            raise AptqError(
                f"evaluator.num_sequences={self.num_sequences}: allowed are whole numbers from 1 on, or null for all."
            )
        if self.batch_size < 1:
            raise AptqError(f"evaluator.batch_size={self.batch_size}: allowed are whole numbers from 1 on.")

    @property
    def max_tokens(self) -> int | None:
        """How many tokens of each text are looked at; ``None`` for all."""
        if self.num_sequences is None:
            return None
        return self.sequence_length + (self.num_sequences - 1) * self._step

    @property
    def _step(self) -> int:
        return self.stride or self.sequence_length

    def evaluate(
        self, model: PreTrainedModel, texts: Sequence[EvaluationText], progress: Callable[[str, float], None]
    ) -> dict[str, dict[str, float]]:
        """Return ``{"perplexity": {text name: value}}``; the model's mode is the same afterwards.

        Raises:
            AptqError: a text is shorter than one window, windows are longer than the model can read, or the model
                gives no finite likelihood.
        """
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and self.sequence_length > limit:
            raise AptqError(
                f"evaluator.sequence_length={self.sequence_length} is more than the {limit} positions of the model. "
                f"Set evaluator.sequence_length={limit} or less."
            )
        windows = {text.name: self._windows(text) for text in texts}  # all are checked before the first runs
        with torch.no_grad(), evaluation_mode(model):
            head = _head(model, next(iter(windows.values()))[:1]) if windows else None
            return {
                "perplexity": {name: self._perplexity(model, head, name, windows[name], progress) for name in windows}
            }

    def _windows(self, text: EvaluationText) -> Tensor:
        """Return the windows of a text, a view ``[windows, sequence_length]``."""
        if len(text.tokens) < self.sequence_length:
            raise AptqError(
                f"The evaluation text {text.name!r} has {len(text.tokens)} tokens, less than one window of "
                f"evaluator.sequence_length={self.sequence_length}. Give more text, or set a shorter length."
            )
        windows = text.tokens.unfold(0, self.sequence_length, self._step)
        if self.num_sequences is not None and len(windows) < self.num_sequences:
            logger.info("The evaluation text %r has %d sequences, no %d.", text.name, len(windows), self.num_sequences)
        return windows[: self.num_sequences]

    def _perplexity(
        self,
        model: PreTrainedModel,
        head: nn.Module | None,
        name: str,
        windows: Tensor,
        progress: Callable[[str, float], None],
    ) -> float:
        device = model.device
        new = torch.full((len(windows), 1), min(self._step, self.sequence_length - 1))
        new[0] = self.sequence_length - 1
        positions = torch.arange(self.sequence_length - 1)
        counted = positions >= self.sequence_length - 1 - new  # [windows, length - 1]: predicted here first
        total = 0.0
        for start in range(0, len(windows), self.batch_size):
            batch = slice(start, start + self.batch_size)
            total += _negative_log_likelihood(model, head, windows[batch].to(device), counted[batch].to(device))
            if not math.isfinite(total):
                raise AptqError(
                    f"The model gives no finite likelihood on the text {name!r} (windows {start} to "
                    f"{start + len(windows[batch]) - 1}): its weights or activations hold NaN or Inf. Use a wider "
                    "model.dtype (bfloat16 or float32), or more bits."
                )
            progress(name, min(1.0, (start + self.batch_size) / len(windows)))
        mean = total / int(counted.sum())
        return math.exp(mean) if mean < 700 else math.inf  # exp overflows at 709.8


def _negative_log_likelihood(model: PreTrainedModel, head: nn.Module | None, tokens: Tensor, counted: Tensor) -> float:
    """Return the summed negative log-likelihood of the counted predictions, summed in float64.

    Args:
        model: a causal language model in evaluation mode.
        head: what ``_head`` gave for it.
        tokens: ``[batch, length]``.
        counted: ``[batch, length - 1]``, bool; whether the prediction of ``tokens[:, 1:]`` counts.
    """
    if head is None:
        head, states = nn.Identity(), _logits(model, tokens)
    else:
        states, _ = _before_head(model, head, tokens)
    states, targets = states[:, :-1][counted], tokens[:, 1:][counted]  # [predictions, width], [predictions]
    rows = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    total = 0.0
    for start in range(0, len(targets), rows):
        logits = head(states[start : start + rows]).float()
        losses = F.cross_entropy(logits, targets[start : start + rows].to(logits.device), reduction="none")
        total += losses.sum(dtype=torch.float64).item()
    return total


def _head(model: PreTrainedModel, tokens: Tensor) -> nn.Module | None:
    """Return the module that gives the logits, or ``None`` where they are changed after it (soft caps, scales).

    Logits of all positions at once would be the largest tensor of the whole run (1.6 GB for four windows of 2048
    tokens and 49152 words). A model whose logits are just what its head gives, as seen on ``tokens [1, length]``, can
    be spared them.
    """
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        return None
    try:
        hidden, last = _before_head(model, head, tokens.to(model.device))
    except IndexError:
        return None  # the head is not called with the hidden states
    if hidden.shape[:2] != tokens.shape or not last.any():  # zeros would look the same with any soft cap
        return None
    return head if torch.equal(last, head(hidden[:, -1:]).to(last.dtype)) else None


def _before_head(model: PreTrainedModel, head: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states ``[batch, length, width]`` that the head is given, and the last position's logits."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept.append(args[0])
        return (args[0][:, -1:], *args[1:])  # so that the head does no work for the others

    handle = head.register_forward_pre_hook(keep)
    try:
        last = _logits(model, tokens)
    finally:
        handle.remove()
    return kept[0], last


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits
