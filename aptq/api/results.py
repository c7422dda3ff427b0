"""Writing, judging and reporting what a run gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from aptq.api.model import Option
from aptq.api.rounding import Format

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class StoredEmbedding:
    """An input embedding ``[vocabulary, hidden]`` that is stored packed, as a weight of so many outputs and inputs."""

    name: str
    option: Option
    format_config: Mapping[str, Any]  # name and options of its format, as in a config
    scale: float | None = None  # what the model's own module multiplies rows by
    head: str | None = None  # name of the linear head that multiplies by the same table


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """A finished quantization that an exporter writes down.

    ``packed(name)`` reads one layer's packed tensors from disk, so that an exporter never holds the whole model.
    """

    plan: Mapping[str, Option]
    shapes: Mapping[str, tuple[int, int]]  # (out, in) of every layer in the plan
    format: Format
    format_config: Mapping[str, Any]  # name and options of the format, as in the config
    packed: Callable[[str], Mapping[str, Tensor]]
    full_precision: Callable[[], Any]  # -> Iterator[tuple[str, Tensor]]: every other tensor of the model
    config: Any  # transformers' PretrainedConfig
    generation_config: Any | None
    tokenizer: PreTrainedTokenizerBase | None
    provenance: Mapping[str, Any]
    activation_config: Mapping[str, Any] | None = None  # of what quantizes the layers' inputs, as in the config
    transform_config: Mapping[str, Any] | None = None  # of the basis that the layers are stored in, likewise
    embedding: StoredEmbedding | None = None  # ``packed`` has it too then, by its name, and ``full_precision`` has not


@runtime_checkable
class Exporter(Protocol):
    """What is written to disk, and who loads it."""

    def check(
        self,
        format: Format,
        format_name: str,
        options: Sequence[Option],
        *,
        shapes: Mapping[str, tuple[int, int]],
        config: Any,
    ) -> None:
        """Raise ``AptqError`` before any work when layers of these shapes cannot be written at these options.

        ``shapes`` are ``(out, in)`` by name, ``config`` is the model's (transformers' PretrainedConfig).
        """

    def export(self, job: ExportJob, folder: Path) -> None:
        """Write a model folder. The caller gives a temporary folder and renames it when this returns."""


@runtime_checkable
class ActivationExporter(Exporter, Protocol):
    """An exporter that may write down how a layer's inputs are quantized, for the reader to do it.

    One that does not say so is not given such a model.
    """

    @property
    def stores_activations(self) -> bool:
        """Whether it does."""


@runtime_checkable
class TransformExporter(Exporter, Protocol):
    """An exporter that may write down which basis layers are stored in, for the reader to change their inputs to it.

    One that does not say so is not given such a model.
    """

    @property
    def stores_transforms(self) -> bool:
        """Whether it does."""


@runtime_checkable
class EmbeddingExporter(Exporter, Protocol):
    """An exporter that may write an input embedding packed (``ExportJob.embedding``).

    One that does not say so is not given such a model.
    """

    @property
    def stores_embeddings(self) -> bool:
        """Whether it does."""


@dataclass(frozen=True, eq=False, kw_only=True)
class EvaluationText:
    """One tokenized text to judge a model by."""

    name: str
    tokens: Tensor  # [length], int64


@runtime_checkable
class Evaluator(Protocol):
    """What a result is judged by."""

    def evaluate(
        self, model: PreTrainedModel, texts: Sequence[EvaluationText], progress: Callable[[str, float], None]
    ) -> dict[str, dict[str, float]]:
        """Return ``{measure: {text name: value}}``; report ``progress(text name, share done)`` on the way."""


@runtime_checkable
class TaskEvaluator(Evaluator, Protocol):
    """An evaluator that brings tasks with data of their own.

    One that does not say so judges by the run's evaluation texts alone.
    """

    @property
    def tasks(self) -> Sequence[str]:
        """Names of its tasks, in the order in which it runs them."""

    @property
    def needs_texts(self) -> bool:
        """Whether ``evaluate`` judges by texts, too. Where it does not, none are read and it is not called."""

    def check(self) -> None:
        """Raise ``AptqError``, before any work, when a task or its data cannot be had here."""

    def evaluate_tasks(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Callable[[str, float], None]
    ) -> dict[str, dict[str, float]]:
        """Return ``{measure: {task: value}}``; report ``progress(task, share done)`` on the way.

        Of a measure ``x`` that has standard errors, ``x_stderr`` (``STANDARD_ERROR``) holds those; a mean over tasks is
        named ``MEAN_OF_TASKS``. The model's mode and the tokenizer are the same afterwards.
        """


STANDARD_ERROR = "_stderr"
"""What the key of a measure's standard errors ends with, as in lm-evaluation-harness."""

MEAN_OF_TASKS = "mean"
"""Name of an evaluator's mean over its tasks, beside their names."""


def judges_texts(evaluator: Evaluator) -> bool:
    """Return whether an evaluator judges by evaluation texts: all do but those whose tasks are all that they have."""
    return not isinstance(evaluator, TaskEvaluator) or evaluator.needs_texts


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One row of ``layers.csv``. Errors are ``Curvature.quadratic``; relative ones are divided by that of W itself."""

    name: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    format: str
    storage_bits: float  # per weight
    tokens: int
    trace: float  # per weight: tr(H) / (out * in)
    predicted_cost: float | None  # None when no metric ran
    error_nearest: float
    error: float
    relative_error: float
    damping: float
    seconds: float
    events: str


class Callback:
    """What happens at the events of a run. Inherit and override; hooks that you leave out do nothing."""

    def on_run_start(self, *, folder: Path, config: Mapping[str, Any]) -> None:
        """A run begins, or is taken up again."""

    def on_stage_start(self, *, stage: str, total: int, unit: str) -> None:
        """A stage ("measure", "quantize", "evaluate", ...) begins; ``total`` units of work lie ahead."""

    def on_advance(self, *, stage: str, done: float, detail: str) -> None:
        """``done`` of ``total`` units are finished; ``detail`` says what is at work now."""

    def on_layer_end(self, *, stage: str, report: LayerReport) -> None:
        """A layer was quantized."""

    def on_block_end(self, *, stage: str, index: int, metrics: Mapping[str, float]) -> None:
        """A block is finished and safe on disk."""

    def on_stage_end(self, *, stage: str, seconds: float) -> None:
        """A stage is over."""

    def on_run_end(self, *, folder: Path, metrics: Mapping[str, Any]) -> None:
        """A run is over and its results are written."""
