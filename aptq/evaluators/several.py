"""Several evaluators in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aptq.api import AptqError, EvaluationText, Evaluator, TaskEvaluator, judges_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_Measures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Several:
    """A ``aptq.api.TaskEvaluator``: each of ``evaluators`` judges in turn, and what all of them say is the result.

    Where two of them give the same measure of the same text or task, the later one's is named ``<text> (<evaluator>)``.
    """

    evaluators: Mapping[str, Evaluator]

    def __post_init__(self) -> None:
        """Raise ``AptqError`` when there is nothing to judge by."""
        if not self.evaluators:
            raise AptqError("evaluator.evaluators is empty. Name one or more, or choose evaluator=none.")

    @property
    def tasks(self) -> Sequence[str]:
        """Tasks of all, one after another."""
        return tuple(dict.fromkeys(task for each in self._with_tasks.values() for task in each.tasks))

    @property
    def needs_texts(self) -> bool:
        """Whether one of them judges by texts."""
        return bool(self._with_texts)

    @property
    def max_tokens(self) -> int | None:
        """How many tokens of each text one of them looks at, at most; None for all."""
        limits = [getattr(each, "max_tokens", None) for each in self._with_texts.values()]
        known = [limit for limit in limits if limit is not None]
        return max(known) if known and len(known) == len(limits) else None

    def check(self) -> None:
        """Raise ``AptqError`` for what one of them cannot have."""
        for each in self._with_tasks.values():
            each.check()

    def evaluate(
        self, model: PreTrainedModel, texts: Sequence[EvaluationText], progress: Callable[[str, float], None]
    ) -> _Measures:
        """Return the measures of texts of all that judge by texts."""
        return _joined((name, each.evaluate(model, texts, progress)) for name, each in self._with_texts.items())

    def evaluate_tasks(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Callable[[str, float], None]
    ) -> _Measures:
        """Return the measures of tasks of all that have tasks."""
        return _joined(
            (name, each.evaluate_tasks(model, tokenizer, progress)) for name, each in self._with_tasks.items()
        )

    @property
    def _with_tasks(self) -> dict[str, TaskEvaluator]:
        return {name: each for name, each in self.evaluators.items() if isinstance(each, TaskEvaluator)}

    @property
    def _with_texts(self) -> dict[str, Evaluator]:
        return {name: each for name, each in self.evaluators.items() if judges_texts(each)}


def _joined(found: Iterable[tuple[str, _Measures]]) -> _Measures:
    result: _Measures = {}
    for evaluator, measures in found:
        for measure, values in measures.items():
            taken = result.setdefault(measure, {})
            taken |= {(f"{name} ({evaluator})" if name in taken else name): value for name, value in values.items()}
    return result
