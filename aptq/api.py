"""The contracts between components: all that a plug-in has to import.

A component is a frozen dataclass whose fields are its options and which satisfies one of the protocols below. It
inherits from nothing. It reaches the program through an entry point in the group of its kind (``aptq.formats``,
``aptq.quantizers``, ...) and a YAML file with the same name in the config group of its kind.

Shapes: ``out`` and ``in`` are the output and input width of a layer's weight ``[out, in]``; ``heads`` is the number of
row blocks that have a curvature of their own (1 for most layers), ``rows = out / heads``.

Units: a curvature is the Hessian of the estimator's objective *per calibration token and per average output row*: with
the layer objective ``sum ||dW x||^2 / tokens`` it is ``2/tokens * sum x x^T``. Costs of one estimator are comparable
across layers; costs of different estimators are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from aptq.errors import AptqError
from aptq.names import place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Allocation",
    "Allocator",
    "AptqError",
    "Backend",
    "Block",
    "BlockInputs",
    "BlockObserver",
    "Callback",
    "Curvature",
    "CurvatureSum",
    "DriftEstimator",
    "DriftObserver",
    "DriftQuantizer",
    "EntryGrid",
    "EvaluationText",
    "Evaluator",
    "ExportJob",
    "Exporter",
    "Factors",
    "Format",
    "Grid",
    "GuidedEstimator",
    "HessianEstimator",
    "Layer",
    "LayerReport",
    "LayerSpec",
    "LayerStatistics",
    "LossChange",
    "LossMetric",
    "Option",
    "Quantizer",
    "QuantizedWeight",
    "Rounded",
    "SensitivityMetric",
]


_STRIP = 256  # columns of a Hessian at once

# ---------------------------------------------------------------------------------------------- the model, as data


@dataclass(frozen=True, order=True)
class Option:
    """One way to store a layer: what an allocator chooses.

    ``bits`` is the width of one code; ``group_size`` the number of consecutive inputs that share their parameters,
    or -1 when a whole row does. The last group of a row is shorter when the width is no multiple of the group size.
    """

    bits: int
    group_size: int

    def num_groups(self, in_features: int) -> int:
        """Return how many groups a row of ``in_features`` weights has."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)


class Layer(Protocol):
    """One weight matrix of the model, seen as ``[out, in]`` whatever module holds it (Linear, Conv1D)."""

    name: str  # full dotted name in the model, "model.layers.0.self_attn.q_proj"
    module: nn.Module

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""

    def weight(self) -> Tensor:
        """Return the weight ``[out, in]``, in the model's dtype and on its device (a view where possible)."""

    def set_weight(self, weight: Tensor) -> None:
        """Write ``[out, in]`` back into the module, cast to its dtype."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Block:
    """One transformer layer with its weights on the device, and the linear layers in it."""

    index: int
    name: str  # "model.layers.0"
    module: nn.Module
    layers: Mapping[str, Layer]  # by full name, in the order of the model
    guidance: Mapping[str, Tensor] = field(default_factory=dict)  # what a ``GuidedEstimator`` asked for, by module


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockInputs:
    """What one batch of calibration samples feeds a block: all that ``block.module`` is called with."""

    hidden: Tensor  # [batch, tokens, width]
    args: tuple[Any, ...]  # positional arguments after the hidden states
    kwargs: Mapping[str, Any]  # masks, rotary embeddings, ... shared by all batches of this shape
    samples: Sequence[int] = ()  # which of all calibration samples these are, for who draws random numbers for each

    def run(self, module: nn.Module) -> Tensor:
        """Call the block and return its new hidden states ``[batch, tokens, width]``."""
        output = module(self.hidden, *self.args, **self.kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden


# ---------------------------------------------------------------------------------------------------- curvature


@dataclass(eq=False, kw_only=True)
class CurvatureSum:
    """Un-normalised sums of one rank, added over ranks before anything is divided.

    Layers that share their input map to the *same* object: it is reduced, factorized and stored once.
    """

    column: Tensor  # [heads, in, in], float32 (float64 for weights in float64)
    tokens: int  # how many tokens were added: fewer than the block saw for the experts of a mixture
    row: Tensor | None = None  # [heads, rows, rows]
    drift: Tensor | None = None  # [heads, in, in], as ``column``; see ``Curvature``


@dataclass(frozen=True, eq=False, kw_only=True)
class Curvature:
    """The curvature that a layer's rounding error is weighed with.

    ``column [heads, in, in]`` is symmetric and positive semi-definite, float32, per token and per average row (see
    the module's docstring). ``row [heads, rows, rows]``, where an estimator gives it, is the same Hessian per average
    *column*: the second factor that two-sided quantizers use. ``tokens`` is how many tokens reached the layer.

    ``drift [heads, in, in]`` is the sum over tokens of ``2 (x_f - x) x^T``, in the weighting and unit of ``column``,
    with ``x_f`` the input that the full-precision model has in the place of ``x``. Its rows go with ``x_f - x``: it is
    not symmetric. It is None unless the quantizer asked for it (``DriftQuantizer``), and on inputs that are the
    full-precision model's own, where it would be zero.
    """

    column: Tensor
    tokens: int
    row: Tensor | None = None
    drift: Tensor | None = None

    @property
    def heads(self) -> int:
        """Number of row blocks with a Hessian of their own."""
        return self.column.shape[0]

    def trace(self, out_features: int) -> float:
        """Return the trace of the whole Hessian over all ``out * in`` weights (rows x sum of the heads' traces)."""
        return out_features / self.heads * self.column.diagonal(dim1=1, dim2=2).double().sum().item()

    def relative_row(self) -> Tensor | None:
        """Return ``row`` divided by its mean diagonal, so that the whole Hessian is about ``row (x) column``."""
        if self.row is None:
            return None
        mean = self.row.diagonal(dim1=1, dim2=2).mean(1)
        return self.row / torch.where(mean > 0, mean, torch.ones_like(mean))[:, None, None]

    def quadratic(self, difference: Tensor) -> float:
        """Return ``tr(R D H D^T) / 2`` for a weight difference ``D [out, in]``: the objective's second-order change.

        ``H`` is ``column`` and ``R`` is ``relative_row``, or the identity where there is none. Goes over ``H`` in
        strips of columns: what is right of the diagonal strip equals what is below it.
        """
        difference = difference.to(self.column.dtype).reshape(self.heads, -1, difference.shape[-1])
        row = self.relative_row()
        mixed = difference if row is None else row @ difference
        total = torch.zeros((), dtype=torch.float64, device=self.column.device)
        for start in range(0, difference.shape[-1], _STRIP):
            strip = slice(start, start + _STRIP)
            weighed = difference[..., strip] @ self.column[:, strip, strip]
            if start:
                weighed += 2 * (difference[..., :start] @ self.column[:, :start, strip])
            total += torch.sum(weighed * mixed[..., strip], dtype=torch.float64)
        return 0.5 * total.item()


class BlockObserver(Protocol):
    """Collects curvature while a block runs."""

    def __call__(self, inputs: BlockInputs) -> Tensor | None:
        """Run the block on one batch, add to the sums, return the block's outputs unchanged.

        May return None, having run only as far as it had to, when it was told that outputs are not needed.
        """

    def sums(self) -> Mapping[str, CurvatureSum]:
        """Return the sums of every layer of the block by name."""


@runtime_checkable
class HessianEstimator(Protocol):
    """Which curvature a layer's rounding error is weighed with."""

    def observe(self, block: Block, *, need_outputs: bool = True) -> AbstractContextManager[BlockObserver]:
        """Watch a block: hooks are on inside the context and gone after it, however it ends.

        Sums must not depend on how samples are batched or split over ranks, nor on ``need_outputs``: False allows the
        observer to stop a forward pass when there is nothing left to see in it.
        """


class LayerObserver(Protocol):
    """Tells the curvature of a block's layers one after the other, while the block's forward passes wait at each."""

    def curvature_sum(self, layer: Layer, inputs: Sequence[Tensor], samples: Sequence[Sequence[int]]) -> CurvatureSum:
        """Return this rank's sums for a layer that all its batches have come to.

        Args:
            layer: the layers before it in the block may have been rounded.
            inputs: what it is about to be called with, ``[..., in]``, by batch; none where the block never calls it.
            samples: which of all calibration samples these are, by batch.

        Returns:
            the same *object* as for the layer before, where the two share their curvature.
        """


@runtime_checkable
class SequentialEstimator(HessianEstimator, Protocol):
    """An estimator that can tell a layer's curvature as soon as all samples have come to the layer.

    Pass 2 can then round it at once, calibrates the next layer behind it, and runs a block once instead of twice.
    """

    def watch(self, block: Block) -> AbstractContextManager[LayerObserver]:
        """Watch a block as ``observe`` does, its batches running side by side from layer to layer."""


@runtime_checkable
class GuidedEstimator(HessianEstimator, Protocol):
    """An estimator that weighs errors by the gradient of the model's loss.

    Before its first pass the engine runs the full-precision model forwards and backwards over all samples, and keeps
    the mean square of the loss's gradient at the outputs that the estimator names, token by token, in
    ``Block.guidance``: ``[all samples, tokens, groups]``, zero for samples of other ranks.
    """

    @property
    def labels(self) -> str | None:
        """What the loss compares predictions with.

        "data" (the next token of the text), "model" (a token drawn from the prediction), or None where the present
        options need no gradients.
        """

    @property
    def seed(self) -> int:
        """Of what is drawn."""

    def guides(self, block: Block) -> Mapping[str, int]:
        """Return the modules of a block, by full name, whose outputs count, and in how many groups of channels.

        A module returns ``[samples, tokens, channels]`` or a tuple that begins with it. A head is a block too.

        Raises:
            AptqError: the block cannot be measured so.
        """


class DriftObserver(LayerObserver, Protocol):
    """A layer observer that can be given the full-precision model's inputs as well."""

    def curvature_sum(
        self,
        layer: Layer,
        inputs: Sequence[Tensor],
        samples: Sequence[Sequence[int]],
        full_precision: Sequence[Tensor] | None = None,
    ) -> CurvatureSum:
        """Return the sums as ``LayerObserver`` does, with their ``drift`` where ``full_precision`` is given.

        ``full_precision`` is what the layer is called with in the full-precision model, by batch, token for token.
        """


@runtime_checkable
class DriftEstimator(SequentialEstimator, Protocol):
    """An estimator that can tell how far a layer's inputs have drifted from the full-precision model's."""

    @property
    def gives_drift(self) -> bool:
        """Whether it can with its present options."""

    def watch(self, block: Block) -> AbstractContextManager[DriftObserver]:
        """Watch a block as ``SequentialEstimator`` does."""


# --------------------------------------------------------------------------------------- formats and quantizers


@dataclass(frozen=True, eq=False, kw_only=True)
class QuantizedWeight:
    """Codes and the parameters that give them meaning; only the format that made it can read it."""

    codes: Tensor  # integer; [out, in] unless the format says otherwise
    parameters: Mapping[str, Tensor]


class Grid(Protocol):
    """A format fitted to one weight ``[heads, rows, in]``: rounds one column at a time, in any order of columns."""

    def permuted(self, order: Tensor) -> Grid:
        """Return the same grid with position ``j`` of head ``h`` being column ``order[h, j]`` (``[heads, in]``)."""

    def round(self, values: Tensor, position: int | slice) -> tuple[Tensor, Tensor]:
        """Round one column, or a run of columns that need no feedback between them.

        Args:
            values: ``[heads, rows]`` for a position, ``[heads, columns, rows]`` for a slice of positions; float, the
                weights after error feedback. Note the order: columns before rows.
            position: where in this grid's order of columns.

        Returns:
            codes, integer-valued in any dtype, in the shape of ``values`` (the last dimension is shorter for formats
            that code several rows at once); and what the codes stand for, in shape and dtype of ``values``.
        """

    def finish(self, codes: Tensor) -> QuantizedWeight:
        """Bind codes ``[heads, in, rows]``, in the order of *this* grid's columns, to the parameters."""


@runtime_checkable
class EntryGrid(Grid, Protocol):
    """A grid that codes each weight by itself: what quantizers need that cross a weight diagonally."""

    def round_entries(self, values: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Round single weights.

        Args:
            values: ``[heads, entries]``, float.
            rows: ``[heads, entries]``, int64: the row of each in its head.
            positions: ``[heads, entries]``, int64: where in this grid's order of columns each is.

        Returns:
            codes and what they stand for, as ``round`` gives them for a column.
        """


@runtime_checkable
class Format(Protocol):
    """What a code means. Options such as symmetry are fields; bits and group size come with the ``Option``."""

    group_size: int  # the group size of options that name none

    def check(self, option: Option, shape: tuple[int, int]) -> None:
        """Raise ``AptqError`` when a layer of this shape cannot be stored so; say what is allowed."""

    def fit(self, weight: Tensor, option: Option, importance: Tensor | None = None) -> Grid:
        """Fit scales, zeros or codebooks to a weight ``[heads, rows, in]``, float.

        ``importance [heads, in]``, where the quantizer has one, is the diagonal of the curvature.
        """

    def dequantize(self, quantized: QuantizedWeight, option: Option) -> Tensor:
        """Return the weight ``[out, in]`` in float32 that the codes stand for, bit for bit as the grid rounded it."""

    def pack(self, quantized: QuantizedWeight, option: Option) -> dict[str, Tensor]:
        """Return the tensors to store, dense to the bit."""

    def unpack(self, tensors: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> QuantizedWeight:
        """Invert ``pack`` for a layer of shape ``(out, in)``."""

    def packed_layout(self, option: Option, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of each tensor that ``pack`` gives, without making it."""


class Factors(Protocol):
    """What a quantizer prepared from a curvature: shared by all layers that share the curvature."""

    @property
    def damping(self) -> float:
        """The damping used, as a share of the mean diagonal; 0 where none was."""

    @property
    def events(self) -> tuple[str, ...]:
        """What went wrong and was mended, in words ("damping raised to 0.1", "fell back to the diagonal")."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Rounded:
    """What a quantizer made of one layer, and the grid that it rounded on, columns in their natural order."""

    weight: QuantizedWeight
    grid: Grid


@runtime_checkable
class Quantizer(Protocol):
    """How the codes are chosen."""

    def prepare(self, curvature: Curvature) -> Factors:
        """Do the work that all layers with this curvature share (damping, order, factorization)."""

    def quantize(self, weight: Tensor, factors: Factors, format: Format, option: Option) -> Rounded:
        """Choose codes for a weight ``[out, in]`` under a format."""


@runtime_checkable
class DriftQuantizer(Quantizer, Protocol):
    """A quantizer that may aim at the full-precision model's outputs, not at those of ``W`` on the inputs it meets.

    In pass 2 it gets curvatures with their ``drift``, for which a second set of activations travels beside the first.
    """

    @property
    def needs_drift(self) -> bool:
        """Whether it does with its present options."""


# ------------------------------------------------------------------------------------- sensitivity and allocation


@dataclass(frozen=True, kw_only=True)
class LossChange:
    """What the model's loss makes of one rounded layer, in nats per token, from one run backwards.

    With ``x_t [in]`` a token's input, ``g_t [out]`` the loss's gradient at its output and ``D`` the weight difference,
    the output moves by ``D x_t``. Second-order changes are those of the Fisher matrix; ``g`` is of the sum over a
    sample's tokens.
    """

    channels: float  # sum_t sum_j (g_tj (D x_t)_j)^2 / 2 tokens: tokens and channels do not act together
    tokens: float  # sum_t (g_t . D x_t)^2 / 2 tokens: tokens do not
    absolute: float  # sum over samples of sum_ij |G_ij D_ij| / tokens, with G = sum_t g_t x_t^T


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """What pass 1 keeps of a layer: plain numbers, cached as JSON.

    ``trace`` is that of the whole Hessian (``Curvature.trace``). ``errors[option]`` is ``Curvature.quadratic`` of the
    layer rounded at that option, in the same unit; empty unless a metric asked for it with ``needs_errors``.
    ``loss_changes[option]`` is what the loss makes of it; empty unless a ``LossMetric`` asked.
    """

    name: str
    shape: tuple[int, int]
    tokens: int
    trace: float
    errors: Mapping[Option, float] = field(default_factory=dict)
    loss_changes: Mapping[Option, LossChange] = field(default_factory=dict)

    @property
    def num_weights(self) -> int:
        """``out * in``."""
        return self.shape[0] * self.shape[1]


@runtime_checkable
class SensitivityMetric(Protocol):
    """What a layer is expected to cost at each option."""

    @property
    def needs_errors(self) -> bool:
        """Whether pass 1 must round every layer at every option to fill ``LayerStatistics.errors``."""

    def cost(self, layer: LayerStatistics, option: Option) -> float:
        """Return the predicted cost of storing the layer so; lower is better. Say the unit."""


@runtime_checkable
class LossMetric(SensitivityMetric, Protocol):
    """A metric that speaks in the unit of the model's loss.

    For it pass 1 runs the full-precision model forwards and backwards, rounds every layer at every option on the way
    back, and fills ``LayerStatistics.loss_changes``.
    """

    @property
    def labels(self) -> str:
        """What the loss compares predictions with: "data" or "model", as for a ``GuidedEstimator``."""

    @property
    def seed(self) -> int:
        """Of what is drawn."""

    @property
    def samples(self) -> int:
        """How many of the calibration samples are run backwards; all where there are no more."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The problem an allocator solves: layers, their options, what each costs and takes."""

    shapes: Mapping[str, tuple[int, int]]  # layer -> (out, in), in the order of the model
    options: Sequence[Option]
    costs: Mapping[str, Mapping[Option, float]]  # empty when the allocator needs none
    storage_bits: Mapping[str, Mapping[Option, int]]  # everything the disk sees: codes, scales, zeros
    other_bytes: int = 0  # of the tensors of the model that are not quantized

    def num_weights(self, name: str) -> int:
        """Weights of one layer."""
        out_features, in_features = self.shapes[name]
        return out_features * in_features

    @property
    def total_weights(self) -> int:
        """Weights of all layers."""
        return sum(self.num_weights(name) for name in self.shapes)

    def blocks(self) -> list[list[str]]:
        """Return the names of each block's layers, from the first block to the last.

        The first number in a name tells its block; a layer without one (the head) belongs to none and is left out.
        """
        by_depth: dict[int, list[str]] = {}
        for name in self.shapes:
            depth, _ = place(name)
            if depth is not None:
                by_depth.setdefault(depth, []).append(name)
        return [by_depth[depth] for depth in sorted(by_depth)]


@runtime_checkable
class Allocator(Protocol):
    """Which option each layer gets."""

    @property
    def needs_costs(self) -> bool:
        """Whether pass 1 has to run at all."""

    def bit_options(self) -> tuple[int, ...]:
        """Return the bits to choose among. Raise ``AptqError`` when the options contradict each other."""

    def allocate(self, problem: Allocation) -> dict[str, Option]:
        """Return an option for every layer, within the budget."""


# ---------------------------------------------------------------------------------------------- packed execution


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerSpec:
    """All that a backend needs to know of a layer to say whether it can run it."""

    out_features: int
    in_features: int
    format: Format
    format_name: str
    option: Option
    dtype: torch.dtype  # of the activations
    device: torch.device


@runtime_checkable
class Backend(Protocol):
    """How packed weights are multiplied."""

    @property
    def priority(self) -> int:
        """``backend=auto`` tries the highest first; ``reference`` is the last, at 0."""

    def refuses(self, spec: LayerSpec) -> str | None:
        """Return why this layer cannot be run here, or None when it can."""

    def prepack(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Turn the checkpoint's tensors into what ``matmul`` reads, once, at load."""

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """Return ``x @ W^T`` for ``x [..., in]``, as ``[..., out]`` in the dtype of ``x``."""


# ------------------------------------------------------------------------------------------ results and their use


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """A finished quantization that an exporter writes down.

    ``packed(name)`` reads one layer's packed tensors from disk, so that an exporter never holds the whole model.
    """

    plan: Mapping[str, Option]
    format: Format
    format_config: Mapping[str, Any]  # name and options of the format, as in the config
    packed: Callable[[str], Mapping[str, Tensor]]
    full_precision: Callable[[], Any]  # -> Iterator[tuple[str, Tensor]]: every other tensor of the model
    config: Any  # transformers' PretrainedConfig
    generation_config: Any | None
    tokenizer: PreTrainedTokenizerBase | None
    provenance: Mapping[str, Any]


@runtime_checkable
class Exporter(Protocol):
    """What is written to disk, and who loads it."""

    def check(self, format: Format, format_name: str, options: Sequence[Option]) -> None:
        """Raise ``AptqError`` before any work when these options cannot be written."""

    def export(self, job: ExportJob, folder: Path) -> None:
        """Write a model folder. The caller gives a temporary folder and renames it when this returns."""


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


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One row of ``layers.csv``. Errors are ``Curvature.quadratic``; relative ones are divided by that of W itself."""

    name: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
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
