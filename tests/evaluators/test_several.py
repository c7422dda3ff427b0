from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from aptq import registry
from aptq.api import AptqError, EvaluationText, TaskEvaluator
from aptq.config import compose
from aptq.evaluation import evaluate_model, needs_texts, parts, texts_for
from aptq.evaluators.lm_eval import LMEval
from aptq.evaluators.perplexity import Perplexity
from aptq.evaluators.several import Several
from aptq.settings import DataSettings

Progress = Callable[[str, float], None]
MODEL: Any = object()


@dataclass(frozen=True)
class Texts:
    """Judges by texts."""

    value: float
    max_tokens: int | None = None

    def evaluate(self, model: Any, texts: Any, progress: Progress) -> dict[str, dict[str, float]]:
        for text in texts:
            progress(text.name, 0.5)
            progress(text.name, 1.0)
        return {"loss": {text.name: self.value for text in texts}}


@dataclass(frozen=True)
class Tasks:
    """Has tasks, and no use for texts."""

    tasks: tuple[str, ...]
    broken: bool = False
    needs_texts: bool = False

    def check(self) -> None:
        if self.broken:
            raise AptqError("no such task")

    def evaluate(self, model: Any, texts: Any, progress: Progress) -> dict[str, dict[str, float]]:
        raise AssertionError("texts are not needed")

    def evaluate_tasks(self, model: Any, tokenizer: Any, progress: Progress) -> dict[str, dict[str, float]]:
        for name in self.tasks:
            progress(name, 1.0)
        return {"acc": {name: float(tokenizer) for name in self.tasks}}


TEXTS = [EvaluationText(name=name, tokens=torch.arange(3)) for name in ("x", "y")]


def judge(evaluator: Any) -> tuple[dict[str, dict[str, float]], list[tuple[float, str]]]:
    told: list[tuple[float, str]] = []
    tokenizer: Any = 0.5
    return evaluate_model(evaluator, MODEL, tokenizer, TEXTS, lambda *each: told.append(each)), told


def test_all_of_them_judge_and_progress_never_goes_back() -> None:
    evaluator = Several({"a": Texts(1.0), "b": Texts(2.0), "c": Tasks(("x", "t")), "d": Tasks(("t",))})
    assert isinstance(evaluator, TaskEvaluator)
    assert parts(evaluator, TEXTS) == ["x", "y", "x", "t"]
    found, told = judge(evaluator)
    assert found == {
        "loss": {"x": 1.0, "y": 1.0, "x (b)": 2.0, "y (b)": 2.0}, "acc": {"x": 0.5, "t": 0.5, "t (d)": 0.5}
    }  # fmt: skip
    done = [share for share, _ in told]
    assert done == sorted(done)
    assert told[0] == (0.5, "x")
    assert told[-1] == (4.0, "t")


def test_one_alone_is_judged_as_ever() -> None:
    assert judge(Texts(3.0)) == ({"loss": {"x": 3.0, "y": 3.0}}, [(0.5, "x"), (1.0, "x"), (1.5, "y"), (2.0, "y")])
    assert judge(Tasks(("t",)))[0] == {"acc": {"t": 0.5}}


def test_texts_are_read_for_those_that_need_them_and_as_far_as_they_do() -> None:
    lost, tokenizer = DataSettings(source="text", evaluation_path="nowhere.txt"), MODEL
    for evaluator in (Tasks(("t",)), Several({"a": Tasks(("t",))}), LMEval()):
        assert not needs_texts(evaluator)
        assert texts_for(evaluator, lost, tokenizer) == []
    assert needs_texts(Texts(1.0))
    assert not needs_texts(None)
    both = Several({"a": Texts(1.0, max_tokens=5), "b": Texts(1.0, max_tokens=9), "c": Tasks(("t",))})
    assert needs_texts(both)
    assert both.max_tokens == 9
    assert Several({"a": Texts(1.0, max_tokens=5), "b": Texts(1.0)}).max_tokens is None
    with pytest.raises(AptqError, match="nowhere"):
        texts_for(both, lost, tokenizer)


def test_each_is_checked_before_any_work() -> None:
    Several({"a": Texts(1.0), "b": Tasks(("t",))}).check()
    with pytest.raises(AptqError, match="no such task"):
        Several({"a": Texts(1.0), "b": Tasks(("t",)), "c": Tasks(("u",), broken=True)}).check()
    with pytest.raises(AptqError, match=r"evaluator\.evaluators is empty"):
        Several({})


def test_the_config_has_perplexity_and_tasks_by_default() -> None:
    config = compose(["evaluator=several", "evaluator.evaluators.lm_eval.limit=20", "seed=5"])
    evaluator = registry.build("evaluator", config.evaluator)
    assert isinstance(evaluator.evaluators["perplexity"], Perplexity)
    assert evaluator.evaluators["lm_eval"] == LMEval(limit=20, seed=5)
    assert evaluator.tasks == ("piqa", "hellaswag", "arc_easy", "arc_challenge", "winogrande")
