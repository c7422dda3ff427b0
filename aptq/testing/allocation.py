"""Do metrics and allocators keep their promises on layers of many sizes."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from aptq.api import (
    Allocation,
    Allocator,
    AptqError,
    LayerStatistics,
    LossChange,
    MeasuringAllocator,
    Option,
    SensitivityMetric,
)
from aptq.testing.assertions import expect

__all__ = ["check_allocator", "check_metric", "random_problem"]

_WIDTHS = (8, 24, 33, 64, 100)
_GROUP_SIZE = 64


def check_metric(metric: SensitivityMetric, *, bits: Sequence[int] = (2, 3, 4, 8)) -> None:
    """Check a metric: finite, repeatable, blind to the layer's name, no lower for a layer that is more sensitive.

    Raises:
        AssertionError: a promise of ``aptq.api.SensitivityMetric`` is broken.
    """
    expect(
        isinstance(metric.needs_errors, bool), f"needs_errors is {metric.needs_errors!r}; true or false is promised."
    )
    options = [Option(bits=width, group_size=_GROUP_SIZE) for width in bits]
    for trace in (0.0, 1e-12, 0.3, 7e5):
        for shape in ((64, 64), (96, 33), (1, 8)):
            layer = _statistics("model.layers.0.mlp.up_proj", shape, trace, options, metric.needs_errors)
            louder = _statistics("other", shape, 2 * trace, options, metric.needs_errors)
            for option in options:
                cost = metric.cost(layer, option)
                case = f"{option}, shape {shape}, trace {trace}"
                expect(
                    isinstance(cost, float) and math.isfinite(cost), f"{case}: the cost is {cost!r}, no finite number."
                )
                expect(metric.cost(layer, option) == cost, f"{case}: the cost of a second call differs.")
                expect(metric.cost(louder, option) >= cost, f"{case}: twice the curvature and errors cost less.")


def _statistics(
    name: str, shape: tuple[int, int], trace: float, options: Sequence[Option], with_errors: bool
) -> LayerStatistics:
    errors = {option: trace * 4.0**-option.bits for option in options} if with_errors else {}
    changes = {option: LossChange(channels=each, tokens=2 * each, absolute=9 * each) for option, each in errors.items()}
    distances = {option: shape[0] * shape[1] * 4.0**-option.bits for option in errors}
    return LayerStatistics(
        name=name,
        shape=shape,
        tokens=64,
        trace=trace,
        errors=errors,
        distances=distances,
        loss_changes=changes,
        divergences=errors,
    )


def check_allocator(allocator: Allocator, *, average_bits: float | None = None) -> None:
    """Check an allocator on seeded problems: a single layer, fused ones, and costs that are equal at all bits.

    The latter it may refuse with ``AptqError``. One that measures is given a judge that finds the costs to be right.

    Args:
        allocator: the component.
        average_bits: its budget in code bits per weight, where it has one: it must never be exceeded.

    Raises:
        AssertionError: a promise of ``aptq.api.Allocator`` is broken.
    """
    expect(
        isinstance(allocator.needs_costs, bool), f"needs_costs is {allocator.needs_costs!r}; true or false is promised."
    )
    bits = allocator.bit_options()
    expect(
        bool(bits) and len(set(bits)) == len(bits) and all(isinstance(width, int) and width > 0 for width in bits),
        f"bit_options() gives {bits!r}; one or more different positive whole numbers are promised.",
    )
    for num_layers in (1, 2, 7, 40):
        for seed, flat in ((0, False), (1, False), (2, True)):
            problem = random_problem(
                bits, num_layers, seed, flat=flat, with_costs=allocator.needs_costs, per_block=3 if seed == 1 else 1
            )
            if seed == 1:
                problem = replace(problem, fused=[block[:2] for block in problem.blocks() if len(block) > 1])
            if isinstance(allocator, MeasuringAllocator):
                problem = replace(problem, judge=CostJudge(problem.costs))
            try:
                _check_allocation(allocator, problem, average_bits, f"{num_layers} layers, seed {seed}")
            except AptqError:  # it may need costs that know bits
                expect(flat, f"{num_layers} layers, seed {seed}: the problem is refused.")


@dataclass
class CostJudge:
    """A judge (``aptq.api.PlanJudge``) by whom a plan diverges as its layers' costs add up to."""

    costs: Mapping[str, Mapping[Option, float]]
    seconds: float = field(default=0.0, compare=False)
    asked: list[Mapping[str, Option]] = field(default_factory=list, compare=False)

    def __call__(self, plans: Sequence[Mapping[str, Option]]) -> list[float]:
        """Return the sums."""
        self.asked += plans
        return [math.fsum(self.costs[name][option] for name, option in plan.items()) for plan in plans]


def random_problem(
    bits: Sequence[int], num_layers: int, seed: int, *, flat: bool, with_costs: bool, per_block: int = 1
) -> Allocation:
    """Return a seeded problem; ``flat`` ones have costs that do not depend on the option, as a trace has."""
    rng = random.Random(seed)
    options = [Option(bits=width, group_size=_GROUP_SIZE) for width in bits]
    names = [f"model.layers.{i // per_block}.linear{i % per_block or ''}" for i in range(num_layers)]
    shapes = {name: (rng.choice(_WIDTHS), rng.choice(_WIDTHS)) for name in names}
    weights = {name: out_features * in_features for name, (out_features, in_features) in shapes.items()}
    loudness = {name: rng.choice([1.0, math.exp(rng.gauss(0, 3))]) for name in shapes}
    costs = {
        name: {option: loudness[name] * (1.0 if flat else weights[name] * 4.0**-option.bits) for option in options}
        for name in shapes
    }
    storage = {
        name: {option: weights[name] * option.bits + 32 * shape[0] * option.num_groups(shape[1]) for option in options}
        for name, shape in shapes.items()
    }
    return Allocation(shapes=shapes, options=options, costs=costs if with_costs else {}, storage_bits=storage)


def _check_allocation(allocator: Allocator, problem: Allocation, average_bits: float | None, case: str) -> None:
    before = copy.deepcopy(problem)
    plan = allocator.allocate(problem)
    expect(problem == before, f"{case}: allocate() changed the problem.")
    missing, extra = set(problem.shapes) - set(plan), set(plan) - set(problem.shapes)
    expect(not missing and not extra, f"{case}: the plan leaves out {sorted(missing)} and invents {sorted(extra)}.")
    for name, option in plan.items():
        expect(option in problem.options, f"{case}: {name} gets {option}, which is none of {list(problem.options)}.")
    expect(allocator.allocate(before) == plan, f"{case}: the plan of a second call differs.")
    for group in problem.fused:
        expect(
            len({plan[name] for name in group}) == 1, f"{case}: the fused layers {list(group)} get different options."
        )
    if average_bits is not None:
        average = sum(problem.num_weights(name) * option.bits for name, option in plan.items()) / problem.total_weights
        expect(
            average <= average_bits * (1 + 1e-6),
            f"{case}: the plan takes {average:.6f} bits per weight on average, {average_bits} are allowed.",
        )
