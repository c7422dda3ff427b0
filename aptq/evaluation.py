"""Judging one model by an evaluator, whatever it judges by: evaluation texts, tasks of its own, or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aptq.api import EvaluationText, Evaluator, TaskEvaluator, judges_texts
from aptq.data import evaluation_texts
from aptq.settings import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def needs_texts(evaluator: Evaluator | None) -> bool:
    """Say whether evaluation texts are read for an evaluator (None: nothing is judged)."""
    return evaluator is not None and judges_texts(evaluator)


def check_tasks(evaluator: Evaluator | None) -> None:
    """Raise ``AptqError`` when a task of the evaluator, if it has tasks, cannot be had; they are read here."""
    if isinstance(evaluator, TaskEvaluator):
        evaluator.check()


def parts(evaluator: Evaluator, texts: Sequence[EvaluationText]) -> list[str]:
    """Return the names of all that a model is judged by: texts, then tasks."""
    return [*(text.name for text in texts), *(evaluator.tasks if isinstance(evaluator, TaskEvaluator) else ())]


def texts_for(evaluator: Evaluator, data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> list[EvaluationText]:
    """Return the evaluation texts that an evaluator needs, as far as it looks at them."""
    if not needs_texts(evaluator):
        return []
    return evaluation_texts(data, tokenizer, getattr(evaluator, "max_tokens", None))


def evaluate_model(
    evaluator: Evaluator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[EvaluationText],
    advance: Callable[[float, str], None],
) -> dict[str, dict[str, float]]:
    """Return ``{measure: {text or task: value}}``.

    ``advance(done, name)`` is told how many of ``parts`` are done, and which is at work.
    """
    names, furthest = parts(evaluator, texts), 0.0

    def reporter(start: int) -> Callable[[str, float], None]:
        def progress(name: str, share: float) -> None:
            nonlocal furthest  # an evaluator of several may go through the same texts again
            furthest = max(furthest, names.index(name, start) + share)
            advance(furthest, name)

        return progress

    measures: dict[str, dict[str, float]] = {}
    if needs_texts(evaluator):
        measures = evaluator.evaluate(model, texts, reporter(0))
    if isinstance(evaluator, TaskEvaluator):
        found = evaluator.evaluate_tasks(model, tokenizer, reporter(len(texts)))
        for measure, values in found.items():
            measures[measure] = {**measures.get(measure, {}), **values}
    return measures
