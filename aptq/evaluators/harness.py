"""What ``lm_eval`` is asked to do: find tasks, run a model that is in memory, and say what came out."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from aptq.api import MEAN_OF_TASKS, STANDARD_ERROR, AptqError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


def load_tasks(names: Sequence[str], include_path: Path | None) -> dict[str, list[Any]]:
    """Return what ``simple_evaluate`` takes for each name: one group, or tasks, with their data.

    Raises:
        AptqError: a name is unknown, a task cannot be run here, or its data cannot be had.
    """
    if not hasattr(TaskManager, "load"):
        raise AptqError("The installed lm_eval is too old: pip install --upgrade 'aptq[eval]'.")
    with _quiet():
        manager = _manager(names, include_path)
        return {name: _load(manager, name) for name in names}


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    own: list[str] = []
    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        own = list(manager.all_tasks)
        if not own:
            raise AptqError(
                f"evaluator.include_path={include_path} has no task file that can be read: YAML files with the key "
                "'task' or 'group', as the harness's own."
            )
        if set(names) <= set(manager.all_subtasks):
            return manager  # a group could name tasks of the harness
    _log.info("lm_eval: reading the index of all tasks")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = list(manager.all_tasks)
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f" Nearest: {', '.join(close)}." if close else ""
            mine = f" The folder {include_path} has: {', '.join(own[:20])}." if own else ""
            raise AptqError(f"evaluator.tasks: lm_eval has no task {name!r}.{hint}{mine} `lm-eval ls tasks` lists all.")
    return manager


def _load(manager: Any, name: str) -> list[Any]:
    _log.info("lm_eval: reading the data of %s", name)
    try:
        loaded = manager.load([name])
    except Exception as error:  # of the harness, of datasets, of the hub, or of a task's own code: no common base
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise AptqError(
            f"The task {name!r} cannot be loaded: {type(error).__name__}: {reason} Its data is downloaded from the hub "
            "where it is not here yet; without a network, give tasks with local files in evaluator.include_path, or "
            "leave this one out of evaluator.tasks."
        ) from error
    for task in loaded["tasks"].values():
        for flag, why in _REFUSED.items():
            if getattr(task, flag, False):
                raise AptqError(f"The task {task.task_name!r} {why}; leave it out of evaluator.tasks.")
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


_REFUSED = {
    "UNSAFE_CODE": "runs code that the model writes, which is not done here",
    "MULTIMODAL": "needs more than text",
}


def measure_tasks(
    loaded: Mapping[str, list[Any]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Callable[[str, float], None],
    *,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Run tasks one after another; return ``{measure: {task: value}}`` with standard errors and means.

    Args:
        loaded: of ``load_tasks``.
        model: in evaluation mode, where it is to run.
        tokenizer: its own; it is not changed.
        progress: called with the name in ``loaded`` and the share of its requests that is done.
        num_fewshot: examples before each question; None is what the task says.
        limit: documents of each task; None is all.
        batch_size: requests that are run at a time.
        seed: of the choice of examples, and of all else that is drawn.
    """
    measures: dict[str, dict[str, float]] = {}
    with _quiet():
        for name, tasks in loaded.items():
            result = simple_evaluate(
                model=_Reporting(model, copy.deepcopy(tokenizer), batch_size, name, progress),
                tasks=tasks,
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch_size,
                log_samples=False,
                task_manager=TaskManager(include_defaults=False),  # they are loaded
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
            if result is None:  # so on ranks beside the first
                return {}
            _tell_examples(result, num_fewshot)
            for task, figures in _figures(result, name).items():
                for measure, value in figures.items():
                    measures.setdefault(measure, {})[task] = value
            progress(name, 1.0)
    return _with_means(measures)


class _Reporting(HFLM):  # type: ignore[misc]
    """The harness's wrapper of a model in memory, which tells how many of its requests are answered."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        name: str,
        progress: Callable[[str, float], None],
    ) -> None:
        super().__init__(
            pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, trust_remote_code=False
        )
        self._asked, self._answered, self._at_once = 0, 0, batch_size
        self._name, self._progress = name, progress
        self.set_cache_hook(self)

    def add_partial(self, *answer: Any) -> None:
        """Take note of an answer: the harness calls this with each, for a cache to keep."""
        self._answered += 1
        if self._answered % self._at_once == 0:  # the answers of a batch come together: its time is that of all
            self._progress(self._name, self._answered / max(self._asked, self._answered))

    def get_model_info(self) -> dict[str, Any]:
        """Return nothing: the harness would ask the hub for the revision of a model that is in memory."""
        return {}

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Answer requests, and count them."""
        self._asked += len(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Answer requests, and count them."""
        self._asked += len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Answer requests, and count them."""
        self._asked += len(requests)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)


def _tell_examples(result: Mapping[str, Any], asked: int | None) -> None:
    """Warn of tasks that have their own number of examples, whatever is asked for."""
    other = {task: shots for task, shots in result.get("n-shot", {}).items() if asked is not None and shots != asked}
    for task, shots in other.items():
        _log.warning("lm_eval: %s is run with %s examples, as its file fixes it, not with %d.", task, shots, asked)


def _figures(result: Mapping[str, Any], name: str) -> dict[str, dict[str, float]]:
    """Return ``{task: {measure: value}}``: of a group with figures of its own those, else of all its tasks."""
    groups = result.get("groups") or {}
    found = {name: _numbers(groups[name])} if name in groups else {}
    if any(found.values()):
        return found
    leaves = {task: _numbers(figures) for task, figures in result["results"].items() if task not in groups}
    return {task: figures for task, figures in leaves.items() if figures}


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a task by measure: "acc,none" is acc, and other filters than none stay in the name."""
    numbers = {}
    for key, value in figures.items():
        metric, comma, how = key.partition(",")
        if not comma or isinstance(value, bool) or not isinstance(value, int | float):
            continue  # a name, an alias, or an error that the harness does not know ("N/A")
        base = metric.removesuffix(STANDARD_ERROR)
        numbers[(base if how == "none" else f"{base},{how}") + metric[len(base) :]] = float(value)
    return numbers


def _with_means(measures: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Add the plain mean over tasks to each measure of several, with its standard error: tasks are independent."""
    result = {measure: dict(values) for measure, values in measures.items()}
    for measure, values in measures.items():
        base = measure.removesuffix(STANDARD_ERROR)
        if len(values) < 2:
            continue
        if base == measure:
            result[measure][MEAN_OF_TASKS] = sum(values.values()) / len(values)
        elif values.keys() == measures.get(base, {}).keys():
            result[measure][MEAN_OF_TASKS] = math.sqrt(sum(error**2 for error in values.values())) / len(values)
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's bars and lines away: progress is told by callbacks, and what matters is in the result."""
    begin, level = tqdm.__init__, logging.getLogger("lm_eval").level

    def silent(bar: Any, *args: Any, **options: Any) -> None:
        begin(bar, *args, **{**options, "disable": True})

    tqdm.__init__ = silent  # the harness has no switch for all of its bars
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        yield
    finally:
        tqdm.__init__ = begin
        logging.getLogger("lm_eval").setLevel(level)
