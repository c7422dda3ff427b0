"""The last stage: the result and the original under the same evaluator, and in their own words."""

from __future__ import annotations

import gc
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aptq.api import Callback, EvaluationText, Evaluator
from aptq.chosen_backends import chosen_backends
from aptq.evaluation import evaluate_model, parts, texts_for
from aptq.layer import dense_weights
from aptq.settings import DataSettings
from aptq.stages import Stages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STAGE = "evaluate"
_PROMPT, _CONTINUATION = 24, 40  # tokens
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Judge:
    """Evaluates a model folder and, beside it, the original."""

    evaluator: Evaluator
    callbacks: Callback
    data: DataSettings
    tokenizer: PreTrainedTokenizerBase

    def __call__(
        self,
        folder: Path,
        original: Callable[[], PreTrainedModel] | None,
        *,
        backend: str | Mapping[str, Any],
        device: torch.device,
        num_samples: int,
    ) -> dict[str, Any]:
        """Return the evaluator's measures, those of the original as ``baseline_<measure>``, and ``samples``.

        ``samples`` go on from evaluation texts: where none are needed, there are none. ``backends`` tells what
        multiplied the result's layers (``aptq.chosen_backends``). Each model is in memory alone. ``original`` None
        leaves the baseline out, in samples too.
        """
        from aptq.hf import load  # imports transformers: heavy

        texts = texts_for(self.evaluator, self.data, self.tokenizer)
        prompts = _prompts(texts, num_samples)
        measures, continuations, backends = self._one(lambda: load(folder, backend=backend), texts, prompts, device, 0)
        result: dict[str, Any] = {"perplexity": {}, "baseline_perplexity": {}, **measures, "backends": backends}
        before: Sequence[str | None] = [None] * len(prompts)
        if original is not None:
            baseline, before, _ = self._one(original, texts, prompts, device, 1)
            result.update((f"baseline_{name}", values) for name, values in baseline.items())
        result["samples"] = [
            {"prompt": self.tokenizer.decode(prompt), "original": old, "quantized": new}
            for prompt, old, new in zip(prompts, before, continuations, strict=True)
        ]
        return result

    def _one(
        self,
        load: Callable[[], PreTrainedModel],
        texts: Sequence[EvaluationText],
        prompts: Sequence[torch.Tensor],
        device: torch.device,
        index: int,
    ) -> tuple[dict[str, dict[str, float]], list[str], list[dict[str, Any]]]:
        model = load().to(device)  # type: ignore[arg-type]  # transformers hides the signature
        backends = chosen_backends(model)
        who = ("quantized model", "original model")[index]

        total = len(parts(self.evaluator, texts))

        def advance(done: float, name: str) -> None:
            self.callbacks.on_advance(stage=STAGE, done=index + done / total, detail=f"{who} on {name}")

        measures = evaluate_model(self.evaluator, model, self.tokenizer, texts, advance)
        self.callbacks.on_advance(stage=STAGE, done=index + 1, detail=f"{who} writes")
        with dense_weights(model):
            continuations = [self._continue(model, prompt) for prompt in prompts]
        del model
        gc.collect()
        return measures, continuations, backends

    def _continue(self, model: PreTrainedModel, prompt: torch.Tensor) -> str:
        ids = prompt[None].to(model.device)
        with torch.no_grad():
            output = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=_CONTINUATION,
                do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id or 0,
            )
        return str(self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def _prompts(texts: Sequence[EvaluationText], number: int) -> list[torch.Tensor]:
    """Take the beginnings of the texts in turn, later passages where there are more prompts than texts."""
    prompts: list[torch.Tensor] = []
    while texts and len(prompts) < number:
        text = texts[len(prompts) % len(texts)]
        start = (len(prompts) // len(texts)) * 4 * _PROMPT
        prompt = text.tokens[start : start + _PROMPT]
        if len(prompt) == 0:
            break
        prompts.append(prompt)
    return prompts


def resources(model: Path, original_bytes: int, stages: Stages) -> dict[str, Any]:
    """Return what every run tells of its sizes, times, peak memory and versions, as ``metrics.json`` names them.

    Args:
        model: folder of the quantized model.
        original_bytes: size of the original's tensors.
        stages: of the run.
    """
    return {
        "bytes": {
            "model": sum(path.stat().st_size for path in model.glob("*.safetensors")),
            "original": original_bytes,
        },
        "seconds": dict(stages.seconds),
        "memory": dict(stages.memory),
        **stages.peaks(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("aptq", "torch", "transformers", "lightning", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
