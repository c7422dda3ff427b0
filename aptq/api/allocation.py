"""What a layer costs at each option, and which option it gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from aptq.api.model import Option
from aptq.names import place


@dataclass(frozen=True, kw_only=True)
class LossChange:
    """What the model's loss makes of one rounded layer, in nats per token, from one run backwards.

    With ``x_t [in]`` a token's input, ``g_t [out]`` the loss's gradient at its output and ``D`` the weight difference,
    the output moves by ``D x_t``. Second-order changes are those of the Fisher matrix; ``g`` is of the sum over a
    sample's tokens.
    """

    channels: float  # sum_t sum_j (g_tj (D x_t)_j)^2 / 2 tokens: tokens and channels do not act together
    tokens: float  # sum_t (g_t . D x_t)^2 / 2 tokens: tokens do not
    # sum over samples of sum_ij |G_ij D_ij| / tokens, with G = sum_t g_t x_t^T; None unless the metric needs it
    absolute: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """What pass 1 keeps of a layer: plain numbers, cached as JSON.

    ``trace`` is that of the whole Hessian (``Curvature.trace``). ``errors[option]`` is ``Curvature.quadratic`` of the
    layer rounded at that option, in the same unit, and ``distances[option]`` the sum of its squared weight differences;
    both are empty unless a metric asked for them with ``needs_errors``.
    ``loss_changes[option]`` is what the loss makes of it; empty unless a ``LossMetric`` asked.
    ``divergences[option]`` is the Kullback-Leibler divergence, in nats per token, that the model's predictions are
    measured to have when this layer alone is rounded; where layers share an option (``Allocation.fused``), the layer's
    share by weights of what they have together. Empty unless a ``DivergenceMetric`` asked.
    """

    name: str
    shape: tuple[int, int]
    tokens: int
    trace: float
    errors: Mapping[Option, float] = field(default_factory=dict)
    distances: Mapping[Option, float] = field(default_factory=dict)
    loss_changes: Mapping[Option, LossChange] = field(default_factory=dict)
    divergences: Mapping[Option, float] = field(default_factory=dict)

    @property
    def num_weights(self) -> int:
        """``out * in``."""
        return self.shape[0] * self.shape[1]


@runtime_checkable
class SensitivityMetric(Protocol):
    """What a layer is expected to cost at each option."""

    @property
    def needs_errors(self) -> bool:
        """Whether pass 1 must round every layer at every option, to fill ``errors`` and ``distances``."""

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
        """What the loss compares predictions with: "data", "model" or "both", as for a ``GuidedEstimator``."""

    @property
    def seed(self) -> int:
        """Of what is drawn."""

    @property
    def samples(self) -> int:
        """How many of the calibration samples are run backwards; all where there are no more."""

    @property
    def needs_absolute(self) -> bool:
        """Whether ``LossChange.absolute`` is to be there, for one more matrix multiplication a layer and sample."""


@runtime_checkable
class DivergenceMetric(SensitivityMetric, Protocol):
    """A metric that asks the model itself, with one layer rounded at a time; fills ``LayerStatistics.divergences``."""

    @property
    def samples(self) -> int:
        """How many of the calibration samples the model is asked about; all where there are no more."""

    @property
    def last_tokens(self) -> int | None:
        """Of each sample, how many predictions are compared, from its end; None for all."""


def units_of(names: Iterable[str], fused: Iterable[Sequence[str]]) -> list[list[str]]:
    """Return layers in their order, those of one of the groups in ``fused`` together, where its first one stands."""
    together = {name: list(group) for group in fused for name in group}
    return [unit for name in names if (unit := together.get(name, [name]))[0] == name]


class PlanJudge(Protocol):
    """What plans do to the model's predictions: measured, not predicted."""

    def __call__(self, plans: Sequence[Mapping[str, Option]]) -> list[float]:
        """Return each plan's divergence from the original's predictions, in nats per token; infinite if not finite.

        Side by side they take less time than one after the other. A layer that a plan does not name stays as it was.
        """

    @property
    def seconds(self) -> float:
        """Time that the calls have taken so far; the same on all ranks."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The problem an allocator solves: layers, their options, what each costs and takes.

    Layers of one of the groups in ``fused`` must get the same option: the one who runs the model runs them as one.
    """

    shapes: Mapping[str, tuple[int, int]]  # layer -> (out, in), in the order of the model
    options: Sequence[Option]
    costs: Mapping[str, Mapping[Option, float]]  # empty when the allocator needs none
    storage_bits: Mapping[str, Mapping[Option, int]]  # everything the disk sees: codes, scales, zeros
    other_bytes: int = 0  # of the tensors of the model that are not quantized
    seconds: Mapping[str, Mapping[Option, float]] = field(default_factory=dict)  # to decode a token; if asked for
    fused: Sequence[Sequence[str]] = ()
    judge: PlanJudge | None = None  # for a ``MeasuringAllocator``

    def num_weights(self, name: str) -> int:
        """Weights of one layer."""
        out_features, in_features = self.shapes[name]
        return out_features * in_features

    @property
    def total_weights(self) -> int:
        """Weights of all layers."""
        return sum(self.num_weights(name) for name in self.shapes)

    def units(self) -> list[list[str]]:
        """Return all layers, those that share an option together, in the order of the model."""
        return units_of(self.shapes, self.fused)

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
        """Return an option for every layer, within the budget, and one for all layers of a fused group."""


@runtime_checkable
class GroupedAllocator(Allocator, Protocol):
    """An allocator that can choose more than bits: every width is offered at each group size, in each format."""

    @property
    def group_sizes(self) -> Sequence[int]:
        """Group sizes to choose among; the format's own where there are none."""

    def check_options(self, options: Sequence[Option]) -> None:
        """Raise ``AptqError`` before any work when it cannot choose among these options."""


@runtime_checkable
class FrontAllocator(Allocator, Protocol):
    """An allocator that gives plans for many budgets at once; the run keeps them beside the one that it makes."""

    def front(self, problem: Allocation) -> dict[str, dict[str, Option]]:
        """Return plans by the name of their budget, each an option for every layer as ``allocate`` gives it."""


@runtime_checkable
class TimedAllocator(Allocator, Protocol):
    """An allocator that may count the time that layers take."""

    @property
    def needs_times(self) -> bool:
        """Whether it does with its present options, and ``Allocation.seconds`` has to be there."""


@runtime_checkable
class BudgetedAllocator(Allocator, Protocol):
    """An allocator that knows without costs what no plan can keep."""

    def check_problem(self, problem: Allocation) -> None:
        """Raise ``AptqError`` where no plan is within the budget. ``problem`` has no costs: none are measured yet."""


@runtime_checkable
class MeasuringAllocator(Allocator, Protocol):
    """An allocator that has plans measured: ``Allocation.judge`` is there for it."""

    @property
    def samples(self) -> int:
        """How many of the calibration samples plans are measured on; all where there are no more."""

    @property
    def calls(self) -> int:
        """How often it asks the judge, at most: for the display."""
