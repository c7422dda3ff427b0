"""Accuracies on tasks, by EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aptq.api import AptqError, EvaluationText
from aptq.evaluators.modes import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LMEval:
    """Judge a model by tasks of the package ``lm_eval`` (Gao et al., doi 10.5281/zenodo.10256836).

    A ``aptq.api.TaskEvaluator``: prompts, data and scoring are the harness's own. Measures are named as there (``acc``,
    ``acc_norm``, ...), each by task, with its standard error as ``<measure>_stderr``; of several tasks their plain
    mean is there too. ``tasks`` are names of tasks, groups or tags; a group with a figure of its own counts as one
    task, the members of others are listed.

    ``num_fewshot`` examples stand before each question (None: as many as the task says), and ``limit`` is the number
    of documents of each task that are looked at, from the first on (None: all). ``include_path`` is a folder of task
    files (YAML) of one's own, which come before the harness's of the same name. Code that such a folder names is run;
    code from data sets of the hub is not.
    """

    tasks: Sequence[str] = ("piqa", "hellaswag", "arc_easy", "arc_challenge", "winogrande")
    num_fewshot: int | None = 0
    limit: int | None = None
    batch_size: int = 8
    include_path: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``AptqError`` for options that no evaluation can serve."""
        if not self.tasks:
            raise AptqError("evaluator.tasks is empty. Name one task or more, or choose evaluator=none.")
        twice = [name for name in self.tasks if list(self.tasks).count(name) > 1]
        if twice:
            raise AptqError(f"evaluator.tasks names {twice[0]!r} more than once. Name each task once.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise AptqError(
                f"evaluator.num_fewshot={self.num_fewshot}: allowed are whole numbers from 0 on, or null for what each "
                "task says."
            )
        if self.limit is not None and self.limit < 1:
            raise AptqError(f"evaluator.limit={self.limit}: allowed are whole numbers from 1 on, or null for all.")
        if self.batch_size < 1:
            raise AptqError(f"evaluator.batch_size={self.batch_size}: allowed are whole numbers from 1 on.")

    @property
    def needs_texts(self) -> bool:
        """False: tasks have data of their own."""
        return False

    def check(self) -> None:
        """Read the tasks and their data, downloading what is not here yet.

        Raises:
            AptqError: the harness is not installed, a task is unknown, would run code that a model wrote or needs
                more than text, or its data cannot be had.
        """
        if find_spec("lm_eval") is None:
            raise AptqError("evaluator=lm_eval needs lm-evaluation-harness: pip install 'aptq[eval]'.")
        if self.include_path is not None and not self.include_path.is_dir():
            raise AptqError(
                f"evaluator.include_path={self.include_path} is no folder. Give a folder with task files (YAML), or "
                "leave it out."
            )
        _ = self._loaded

    @cached_property
    def _loaded(self) -> Mapping[str, list[Any]]:
        """What each name stands for; the index of all tasks takes half a minute to build, so it is read once."""
        from aptq.evaluators.harness import load_tasks  # imports lm_eval: not every installation has it

        return load_tasks(self.tasks, self.include_path)

    def evaluate(
        self, model: PreTrainedModel, texts: Sequence[EvaluationText], progress: Callable[[str, float], None]
    ) -> dict[str, dict[str, float]]:
        """Return nothing: texts are no tasks."""
        return {}

    def evaluate_tasks(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Callable[[str, float], None]
    ) -> dict[str, dict[str, float]]:
        """Return ``{measure: {task: value}}``, shares of 1; the model's mode is the same afterwards.

        Raises:
            AptqError: what ``check`` raises.
        """
        self.check()
        from aptq.evaluators.harness import measure_tasks

        with evaluation_mode(model):
            return measure_tasks(
                self._loaded,
                model,
                tokenizer,
                progress,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                batch_size=self.batch_size,
                seed=self.seed,
            )
