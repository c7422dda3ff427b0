import importlib
import json
import logging
import sys
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import aptq
from aptq.api import AptqError, TaskEvaluator
from aptq.evaluators import lm_eval as component
from aptq.evaluators.lm_eval import LMEval
from aptq.experiment import evaluate
from aptq.metrics_schema import check_metrics
from aptq.testing import check_evaluator

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="needs lm-evaluation-harness: pip install 'aptq[eval]'"
)
# The harness's and its dependencies' own warnings, which are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")

QUESTIONS = [
    {"question": f"Is {number} even?", "options": ["yes", "no"], "label": number % 2} for number in range(3, 15)
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: options
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the tasks even, more (which fixes num_fewshot) and the group both, of local files."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    (folder / "even.yaml").write_text(TASK.format(name="even", data=data))
    (folder / "more.yaml").write_text(TASK.format(name="more", data=data) + "num_fewshot: 0\n")
    return folder


@pytest.fixture
def tiny(tiny_model_folder: Callable[..., Path]) -> tuple[Any, Any]:
    path = tiny_model_folder("llama")
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def ignore(name: str, share: float) -> None:
    pass


@torch.no_grad()
def by_hand(model: Any, tokenizer: Any, question: dict[str, Any]) -> tuple[float, float]:
    """Return whether the likeliest answer is right, and whether the likeliest for its length in characters is."""
    scores = []
    for option in question["options"]:
        context = tokenizer(question["question"])["input_ids"]
        tokens = torch.tensor([tokenizer(f"{question['question']} {option}")["input_ids"]])
        losses = torch.log_softmax(model(tokens).logits[0, :-1].double(), -1)
        chosen = losses.gather(1, tokens[0, 1:, None])[len(context) - 1 :]
        scores.append(chosen.sum().item())
    normed = [score / len(option) for score, option in zip(scores, question["options"], strict=True)]
    right = question["label"]
    return float(scores.index(max(scores)) == right), float(normed.index(max(normed)) == right)


@needs_harness
def test_accuracy_is_that_of_the_likeliest_answer(folder: Path, tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    found = LMEval(tasks=["even"], include_path=folder).evaluate_tasks(model, tokenizer, ignore)
    expected = torch.tensor([by_hand(model, tokenizer, each) for each in QUESTIONS], dtype=torch.float64)
    assert 0 < expected.mean() < 1
    assert found["acc"] == {"even": pytest.approx(expected[:, 0].mean().item())}
    assert found["acc_norm"] == {"even": pytest.approx(expected[:, 1].mean().item())}
    error = (expected[:, 0].std() / len(QUESTIONS) ** 0.5).item()  # of a mean of independent answers
    assert found["acc_stderr"] == {"even": pytest.approx(error)}


@needs_harness
def test_limit_takes_the_first_documents_and_examples_change_the_question(
    folder: Path, tiny: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = tiny
    few = LMEval(tasks=["even"], limit=5, include_path=folder).evaluate_tasks(model, tokenizer, ignore)
    assert few["acc"]["even"] == pytest.approx(sum(by_hand(model, tokenizer, each)[0] for each in QUESTIONS[:5]) / 5)
    asked: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: asked.append(args[0].shape[1]))
    lengths = []
    for shots in (0, 2):
        asked.clear()
        evaluator = LMEval(tasks=["even"], limit=2, num_fewshot=shots, include_path=folder)
        evaluator.evaluate_tasks(model, tokenizer, ignore)
        lengths.append(max(asked))
    handle.remove()
    assert lengths[1] > 2 * lengths[0]
    with caplog.at_level(logging.WARNING):
        LMEval(tasks=["more"], limit=2, num_fewshot=2, include_path=folder).evaluate_tasks(model, tokenizer, ignore)
    assert "more is run with 0 examples, as its file fixes it, not with 2" in caplog.text


@needs_harness
def test_groups_with_a_figure_of_their_own_count_as_one_task(folder: Path, tiny: tuple[Any, Any]) -> None:
    (folder / "third.yaml").write_text((folder / "even.yaml").read_text().replace("task: even", "task: third"))
    means = "aggregate_metric_list: [{metric: acc, aggregation: mean}]\n"
    (folder / "both.yaml").write_text("group: both\ntask: [even, more]\n" + means)
    (folder / "list.yaml").write_text("group: list\ntask: [third]\n")
    evaluator = LMEval(tasks=["both", "list"], limit=3, include_path=folder)
    assert isinstance(evaluator, TaskEvaluator)
    harness = importlib.import_module("aptq.evaluators.harness")

    class Own(harness.TaskManager):  # without the harness's 14,000 tasks, whose index takes half a minute
        def __init__(self, include_path: str | None = None, include_defaults: bool = True) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "TaskManager", Own)
        found = evaluator.evaluate_tasks(*tiny, ignore)
        assert list(found["acc"]) == ["both", "third", "mean"]
        with pytest.raises(AptqError, match=r"no task 'evem'\. Nearest: .*even.* The folder .* has: .*even"):
            LMEval(tasks=["evem"], include_path=folder).check()


@needs_harness
@pytest.mark.parametrize("quantized", [False, True])
def test_keeps_its_promises(
    quantized: bool, folder: Path, tmp_path: Path, tiny: tuple[Any, Any], overrides: Callable[..., list[str]]
) -> None:
    model, tokenizer = tiny
    if quantized:
        run = aptq.quantize(overrides("evaluator=none", "model.quantize_embeddings=8"))
        model = aptq.load(run.model_folder)
    model.train()  # and is so again afterwards
    check_evaluator(LMEval(tasks=["even", "more"], include_path=folder), model, tokenizer=tokenizer)


@needs_harness
def test_what_cannot_be_had_is_said_before_any_work(folder: Path, tmp_path: Path) -> None:
    (folder / "lost.yaml").write_text(TASK.format(name="lost", data=tmp_path / "nowhere.jsonl"))
    with pytest.raises(AptqError, match=r"'lost' cannot be loaded: FileNotFoundError: .*nowhere"):
        LMEval(tasks=["lost"], include_path=folder).check()
    (folder / "code.yaml").write_text((folder / "even.yaml").read_text() + "task: code\nunsafe_code: true\n")
    with pytest.raises(AptqError, match="'code' runs code that the model writes"):
        LMEval(tasks=["code"], include_path=folder).check()
    with pytest.raises(AptqError, match=r"nothing is no folder"):
        LMEval(include_path=tmp_path / "nothing").check()
    (tmp_path / "empty").mkdir()
    with pytest.raises(AptqError, match="has no task file"):
        LMEval(include_path=tmp_path / "empty").check()


@pytest.fixture
def overrides(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog, being lazy, lets it. \n\n" * 60)

    def make(*more: str) -> list[str]:
        return [
            *(f"model.path={tiny_model_folder('llama')}", "data=text", f"data.path={text}", "data.num_samples=2"),
            *("data.sequence_length=64", "format.group_size=32", "fabric=cpu", "callback=none", "metric=error"),
            *(
                "allocator=uniform",
                "allocator.bits=3",
                f"cache_dir={tmp_path / 'cache'}",
                f"run.dir={tmp_path / 'run'}",
            ),
            *more,
        ]

    return make


@needs_harness
def test_a_run_is_judged_by_tasks_and_evaluated_again(
    folder: Path, overrides: Callable[..., list[str]], tiny_model_folder: Callable[..., Path]
) -> None:
    tasks = [f"evaluator.include_path={folder}", "evaluator.tasks=[even,more]"]
    run = aptq.quantize(overrides("evaluator=lm_eval", *tasks))  # no evaluation text is named
    metrics = run.metrics()
    check_metrics(metrics)
    assert set(metrics["acc"]) == {"even", "more", "mean"} == set(metrics["baseline_acc"])
    assert set(metrics["acc_stderr"]) == {"even", "more", "mean"} == set(metrics["baseline_acc_stderr"])
    assert metrics["perplexity"] == metrics["baseline_perplexity"] == {}
    assert metrics["samples"] == []
    words = ["data=text", "evaluator=lm_eval", *tasks, "fabric=cpu", "callback=none"]
    for path, prefix in ((run.model_folder, ""), (tiny_model_folder("llama"), "baseline_")):
        again = evaluate([f"model.path={path}", *words])
        assert again == {measure: metrics[f"{prefix}{measure}"] for measure in again}


@needs_harness
def test_perplexity_and_tasks_in_one_run(folder: Path, overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    part = "evaluator.evaluators"
    words = ("evaluator=several", f"{part}.lm_eval.include_path={folder}", f"{part}.lm_eval.tasks=[even]")
    text = f"data.evaluation_path={{fox: {tmp_path / 'text.txt'}}}"
    metrics = aptq.quantize(overrides(*words, text, f"{part}.perplexity.num_sequences=2", "samples=1")).metrics()
    assert set(metrics["acc"]) == {"even"}
    assert set(metrics["perplexity"]) == {"fox"} == set(metrics["baseline_perplexity"])
    assert len(metrics["samples"]) == 1


def test_the_missing_extra_is_named_before_any_work(
    monkeypatch: pytest.MonkeyPatch, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    monkeypatch.setattr(component, "find_spec", lambda name: None)
    with pytest.raises(AptqError, match=r"pip install 'aptq\[eval\]'"):
        aptq.quantize(overrides("evaluator=lm_eval"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tasks": []}, "evaluator.tasks is empty"),
        ({"tasks": ["a", "b", "a"]}, "names 'a' more than once"),
        ({"num_fewshot": -1}, "evaluator.num_fewshot=-1"),
        ({"limit": 0}, "evaluator.limit=0"),
        ({"batch_size": 0}, "evaluator.batch_size=0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(AptqError, match=told):
        LMEval(**options)


# ------------------------------------------------------------------ what we make of the harness's answers, without it


class _Bar:
    """Stands for ``tqdm``; not that of others, which is patched meanwhile."""

    def __init__(self, disable: bool = False) -> None:
        self.disable = disable


class _Wrapper:
    """Stands for ``HFLM``: answers as many requests as it is asked."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def set_cache_hook(self, hook: Any) -> None:
        self.hook = hook

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> None:
        for request in requests:
            self.hook.add_partial("loglikelihood", request, (0.0, True))


class _Manager:
    def __init__(self, include_path: str | None = None, include_defaults: bool = True) -> None:
        self.all_tasks = self.all_subtasks = ["one", "two"]

    def load(self, names: list[str]) -> dict[str, Any]:
        if names == ["two"]:
            raise ConnectionError("Couldn't reach 'two' on the Hub\nand more")
        return {"tasks": {names[0]: types.SimpleNamespace(task_name=names[0])}, "groups": {}}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import the module that talks to ``lm_eval`` with one that is not it."""

    def simple_evaluate(*, model: Any, tasks: list[Any], **options: Any) -> dict[str, Any]:
        assert _Bar().disable, "bars are not shown"
        assert options["limit"] == 7
        assert options["fewshot_random_seed"] == options["random_seed"] == 3
        model.loglikelihood(["a", "b", "c", "d"])
        figures = {
            "alias": "x", "sample_len": 7, "acc,none": 0.5, "acc_stderr,none": 0.3,
            "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A",
        }  # fmt: skip
        return {"results": {task.task_name: figures for task in tasks}, "n-shot": {"one": 0}}

    fakes = {
        "lm_eval": types.SimpleNamespace(simple_evaluate=simple_evaluate),
        "lm_eval.models.huggingface": types.SimpleNamespace(HFLM=_Wrapper),
        "lm_eval.tasks": types.SimpleNamespace(TaskManager=_Manager),
        "tqdm": types.SimpleNamespace(tqdm=_Bar),
    }
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.delitem(sys.modules, "aptq.evaluators.harness", raising=False)
    yield importlib.import_module("aptq.evaluators.harness")
    sys.modules.pop("aptq.evaluators.harness", None)  # the next to import it gets the true one


def test_figures_are_read_and_averaged(harness: Any, caplog: pytest.LogCaptureFixture) -> None:
    shares: list[tuple[str, float]] = []
    one, two = ([types.SimpleNamespace(task_name=name)] for name in ("one", "two"))
    found = harness.measure_tasks(
        {"one": one, "two": two}, None, None, lambda *told: shares.append(told), num_fewshot=4, limit=7, batch_size=2,
        seed=3,
    )  # fmt: skip
    assert found == {
        "acc": {"one": 0.5, "two": 0.5, "mean": 0.5},
        "acc_stderr": {"one": 0.3, "two": 0.3, "mean": pytest.approx(0.3 / 2**0.5)},
        "exact_match,strict-match": {"one": 0.25, "two": 0.25, "mean": 0.25},
    }
    assert [share for name, share in shares if name == "one"] == [0.5, 1.0, 1.0]
    assert "one is run with 0 examples, as its file fixes it, not with 4" in caplog.text
    assert not _Bar().disable, "bars of others are shown again"


def test_tasks_that_cannot_be_had_are_named(harness: Any) -> None:
    assert list(harness.load_tasks(["one"], None)) == ["one"]
    with pytest.raises(AptqError, match=r"no task 'ones'\. Nearest: one\."):
        harness.load_tasks(["one", "ones"], None)
    with pytest.raises(
        AptqError, match=r"'two' cannot be loaded: ConnectionError: Couldn't reach 'two' on the Hub Its"
    ):
        harness.load_tasks(["two"], None)
