"""From measured layers to a plan: pass 1, the allocator, and the audit of what it went by."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aptq.api import Allocation, AptqError, BudgetedAllocator, Format, FrontAllocator, MeasuringAllocator, Option
from aptq.audit import CHOSEN, audit, candidates, preferred
from aptq.calibration.quantize import storage_bits
from aptq.fusion import fused_groups
from aptq.measurement import AUDIT, SEARCH, Measurement
from aptq.names import place
from aptq.plan import Plan

if TYPE_CHECKING:
    from aptq.calibration.walk import Walk
    from aptq.models import ModelSource
    from aptq.pipeline import Experiment
    from aptq.stages import Stages

_log = logging.getLogger(__name__)

_AUDITED_SAMPLES = 2
"""Of the calibration samples: the divergence of two differs from that of all by less than plans from each other."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Planned:
    """A plan, and what it was made of."""

    plan: Plan
    problem: Allocation
    audit: Mapping[str, Any] | None  # ``aptq.audit.audit``, if there was one
    front: Mapping[str, Plan]  # the plans of other budgets by name, of an allocator that gives them


def make_plan(experiment: Experiment, walk: Walk, stages: Stages, options: Sequence[Option]) -> Planned:
    """Measure where the allocator needs it, allocate, and audit the plan where that is asked for."""
    shapes = walk.source.layer_shapes()
    fused = fused_groups(shapes) if experiment.fused else []
    figures, note = None, {}
    with Measurement(experiment, walk, stages, options, fused) as measurement:
        problem = _problem(experiment, walk, measurement, options, fused)
        layers: Mapping[str, Option] = _allocated(experiment, problem, measurement, stages)
        if experiment.audit:
            audited = candidates(problem, layers, experiment.audit, experiment.data.seed)
            with measurement.judge(AUDIT, _AUDITED_SAMPLES, calls=1) as judge:
                measured = judge([each.plan for each in audited])
            figures = audit(problem, audited, measured)
            taken = preferred(audited, measured)
            layers = taken.plan
            if taken.kind != CHOSEN:
                note = {"audit": "the same bits everywhere were measured to be better"}
    front = experiment.allocator.front(problem) if isinstance(experiment.allocator, FrontAllocator) else {}
    return Planned(
        plan=_plan(experiment, problem, layers, note),
        problem=problem,
        audit=figures,
        front={name: _plan(experiment, problem, each, {"budget": name}) for name, each in front.items()},
    )


def _plan(experiment: Experiment, problem: Allocation, layers: Mapping[str, Option], note: Mapping[str, str]) -> Plan:
    """Return a plan with its averages and predicted costs."""
    costs = {name: problem.costs[name][option] for name, option in layers.items()} if problem.costs else {}
    return Plan(
        layers=layers,
        budget={**budget(experiment, problem.shapes, layers), **_decoding(problem, layers), **note},
        predicted_cost=sum(costs.values()) if costs else None,
        fused_groups=[list(group) for group in problem.fused],
        layer_costs=costs,
    )


def _decoding(problem: Allocation, layers: Mapping[str, Option]) -> dict[str, float]:
    """Return what a plan is predicted to take to decode a token, where times are known."""
    if not problem.seconds:
        return {}
    return {"decode_milliseconds": 1e3 * sum(problem.seconds[name][option] for name, option in layers.items())}


def _problem(
    experiment: Experiment, walk: Walk, measurement: Measurement, options: Sequence[Option], fused: list[list[str]]
) -> Allocation:
    """Measure what each layer costs at each option, where the allocator needs it."""
    source = walk.source
    shapes = source.layer_shapes()
    sizes = {
        name: {option: storage_bits(experiment.format, option, shape) for option in options}
        for name, shape in shapes.items()
    }
    problem = Allocation(
        shapes=shapes,
        options=options,
        costs={},
        storage_bits=sizes,
        other_bytes=source.other_bytes + embedding_bytes(experiment, source),
        seconds={} if experiment.decode_times is None else experiment.decode_times.of(shapes, options),
        fused=fused,
    )
    if isinstance(experiment.allocator, BudgetedAllocator):
        experiment.allocator.check_problem(problem)  # before minutes are spent on costs
    if not experiment.allocator.needs_costs:
        return problem
    statistics = measurement.statistics()
    costs = {name: {option: experiment.metric.cost(statistics[name], option) for option in options} for name in shapes}
    return replace(problem, costs=with_unseen(costs))


def _allocated(
    experiment: Experiment, problem: Allocation, measurement: Measurement, stages: Stages
) -> dict[str, Option]:
    """Return the allocator's plan, in the order of the model.

    Raises:
        AptqError: the allocator is one of a plug-in that splits a fused group or leaves a layer out.
    """
    allocator = experiment.allocator
    if isinstance(allocator, MeasuringAllocator):
        with measurement.judge(SEARCH, allocator.samples, calls=allocator.calls) as judge:
            plan = allocator.allocate(replace(problem, judge=judge))
    else:
        with stages("allocate"):
            plan = allocator.allocate(problem)
    name = experiment.config["allocator"]["name"]
    for layer in problem.shapes:
        if plan.get(layer) not in problem.options:
            raise AptqError(f"allocator={name} gives {layer} {plan.get(layer)}, which is none of {problem.options}.")
    for group in problem.fused:
        if len({plan[layer] for layer in group}) > 1:
            raise AptqError(
                f"allocator={name} gives different options to {', '.join(group)}, which are to share one (fused=true, "
                f"or target={experiment.target.name}); use an allocator that sees to it, such as knapsack."
            )
    return {layer: plan[layer] for layer in problem.shapes}


def with_unseen(costs: Mapping[str, Mapping[Option, float]]) -> dict[str, dict[Option, float]]:
    """Return the costs, those of layers that no token came to (experts) replaced by the mean of their kind.

    Such a layer seems to cost nothing at any option: that is not known, and it would be the first to lose its bits.
    """
    unseen = [name for name, options in costs.items() if not any(options.values())]
    filled = {name: dict(options) for name, options in costs.items()}
    seen: dict[str, list[Mapping[Option, float]]] = {}
    for name, options in costs.items():
        if any(options.values()):
            seen.setdefault(place(name)[1], []).append(options)
    for name in unseen:
        if alike := seen.get(place(name)[1]):
            filled[name] = {option: sum(each[option] for each in alike) / len(alike) for option in costs[name]}
    if unseen:
        _log.warning(
            "%d layers were fed no token of the calibration text, %s among them: they are taken to cost what others "
            "of their kind do. More samples would tell.",
            len(unseen),
            unseen[0],
        )
    return filled


def budget(
    experiment: Experiment, shapes: Mapping[str, tuple[int, int]], layers: Mapping[str, Option]
) -> dict[str, Any]:
    """Return where a plan came from, and its averages."""
    given = experiment.plan_path
    origin = {"allocator": experiment.config["allocator"]} if given is None else {"plan": str(given)}
    bits = average_bits(experiment.format, shapes, layers)
    coding = experiment.embedding
    beside = (
        {} if coding is None else {"embedding": {"bits": coding.option.bits, "group_size": coding.option.group_size}}
    )
    return {**origin, **{f"{which}_bits": average for which, average in bits.items()}, **beside}


def embedding_bytes(experiment: Experiment, source: ModelSource) -> int:
    """Return what a quantized embedding takes on disk; 0 where it is none, and among ``other_bytes``."""
    if experiment.embedding is None or source.embedding is None:
        return 0
    return storage_bits(experiment.embedding.format, experiment.embedding.option, source.embedding.shape) // 8


def average_bits(format: Format, shapes: Mapping[str, tuple[int, int]], plan: Mapping[str, Option]) -> dict[str, float]:
    """Return the averages in bits per quantized weight: codes alone, and all that is stored."""
    weights = {name: shapes[name][0] * shapes[name][1] for name in plan}
    code = sum(option.bits * weights[name] for name, option in plan.items())
    storage = sum(storage_bits(format, option, shapes[name]) for name, option in plan.items())
    return {"code": code / sum(weights.values()), "storage": storage / sum(weights.values())}
