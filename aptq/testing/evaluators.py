"""Do evaluators keep their promises on a running model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from aptq.api import STANDARD_ERROR, EvaluationText, Evaluator, TaskEvaluator, judges_texts
from aptq.testing.assertions import expect, expect_equal
from aptq.testing.models import hooks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_evaluator(
    evaluator: Evaluator,
    model: PreTrainedModel,
    *,
    length: int = 256,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Check an evaluator on a small model and two texts of random tokens, and on its tasks where it has some.

    Args:
        evaluator: what to check.
        model: runs within seconds.
        length: of the texts, in tokens.
        tokenizer: the model's; a ``TaskEvaluator`` needs it.

    Raises:
        AssertionError: a promise of ``aptq.api.Evaluator`` or ``TaskEvaluator`` is broken.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.vocab_size)
    texts = [
        EvaluationText(name=name, tokens=torch.randint(vocabulary, (length,), generator=generator))
        for name in ("a", "b")
    ]
    if judges_texts(evaluator):
        found = _judge_twice("evaluate", lambda progress: evaluator.evaluate(model, texts, progress), model, ("a", "b"))
        for measure, values in found.items():
            expect(set(values) == {"a", "b"}, f"{measure} has values for {sorted(values)}; the texts are a and b.")
    if isinstance(evaluator, TaskEvaluator):
        expect(tokenizer is not None, "An evaluator with tasks is checked with a tokenizer: tokenizer=...")
        assert tokenizer is not None
        before = (len(tokenizer), dict(tokenizer.special_tokens_map))
        tasks, tasks_of = tuple(evaluator.tasks), evaluator.evaluate_tasks
        evaluator.check()
        found = _judge_twice("evaluate_tasks", lambda progress: tasks_of(model, tokenizer, progress), model, tasks)
        for measure in found:
            base = measure.removesuffix(STANDARD_ERROR)
            expect(
                base == measure or set(found[measure]) <= set(found.get(base, ())),
                f"{measure} has standard errors of what {base} has no figures of.",
            )
        after = (len(tokenizer), dict(tokenizer.special_tokens_map))
        expect(after == before, "evaluate_tasks() changes the tokenizer.")


def _judge_twice(
    method: str,
    judge: Callable[[Callable[[str, float], None]], dict[str, dict[str, float]]],
    model: PreTrainedModel,
    names: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Return what an evaluator says of a model, once it is seen that it says so again and leaves the model alone."""
    weights = {name: each.clone() for name, each in model.state_dict().items()}
    training, hooks, reported = model.training, hooks_of(model), []
    results = judge(lambda name, share: reported.append((name, share)))
    expect(bool(results), f"{method}() returns no measure.")
    for measure, values in results.items():
        for name, value in values.items():
            expect(isinstance(value, float) and math.isfinite(value), f"{measure} of {name} is {value!r}.")
    for name in names:
        shares = [share for part, share in reported if part == name]
        expect(
            shares == sorted(shares) and bool(shares) and shares[0] >= 0 and shares[-1] <= 1,
            f"progress of {name}: {shares}.",
        )
    strange = sorted({name for name, _ in reported} - set(names))
    expect(not strange, f"{method}() reports progress of {', '.join(strange)}, not only of {', '.join(names)}.")
    expect(judge(lambda name, share: None) == results, "A second call gives other results.")
    expect(model.training == training and hooks_of(model) == hooks, f"{method}() leaves the model in another state.")
    for name, tensor in model.state_dict().items():
        expect_equal(tensor, weights[name], f"{name} of the model after {method}()")
    return results
