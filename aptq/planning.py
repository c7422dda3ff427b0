"""From measured layers to a plan: pass 1, the allocator, and the audit of what it went by."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aptq.api import Allocation, Format, LayerStatistics, LossMetric, Option
from aptq.audit import CHOSEN, audit, candidates, preferred
from aptq.calibration.divergence import STAGE as AUDIT
from aptq.calibration.divergence import measure_divergence
from aptq.calibration.guidance import STAGE as GRADIENTS
from aptq.calibration.measure import STAGE as MEASURE
from aptq.calibration.measure import Rounding, measure
from aptq.calibration.quantize import storage_bits
from aptq.calibration.roundings import Roundings
from aptq.calibration.score import score
from aptq.calibration.statistics import StatisticsCache, code_fingerprint, content_key
from aptq.names import place
from aptq.plan import Plan

if TYPE_CHECKING:
    from aptq.calibration.walk import Walk
    from aptq.pipeline import Experiment, Stages

_log = logging.getLogger(__name__)

_AUDITED_SAMPLES = 2
"""Of the calibration samples: the divergence of two differs from that of all by less than plans from each other."""


def make_plan(
    experiment: Experiment, walk: Walk, stages: Stages, options: Sequence[Option]
) -> tuple[Plan, Allocation, dict[str, Any] | None]:
    """Measure where the allocator needs it, allocate, and audit the plan where that is asked for.

    Returns:
        the plan; the problem that it solves; and the audit's figures (``aptq.audit.audit``), if there was one.
    """
    problem = _problem(experiment, walk, stages, options)
    with stages("allocate"):
        layers: Mapping[str, Option] = experiment.allocator.allocate(problem)
    figures, replaced = None, False
    if experiment.audit:
        audited = candidates(problem, layers, experiment.audit, experiment.data.seed)
        with stages(AUDIT, walk.source.num_steps, "block"):
            measured = measure_divergence(
                walk,
                experiment.estimator,
                Rounding(quantizer=experiment.quantizer, format=experiment.format),
                [each.plan for each in audited],
                num_samples=_AUDITED_SAMPLES,
                callbacks=experiment.callbacks,
            )
        figures = audit(problem, audited, measured)
        taken = preferred(audited, measured)
        layers, replaced = taken.plan, taken.kind != CHOSEN
    costs = {name: problem.costs[name][option] for name, option in layers.items()} if problem.costs else {}
    plan = Plan(
        layers=layers,
        format_name=experiment.format_name,
        budget={
            **budget(experiment, problem.shapes, layers),
            **({"audit": "the same bits everywhere were measured to be better"} if replaced else {}),
        },
        predicted_cost=sum(costs.values()) if costs else None,
        layer_costs=costs,
    )
    return plan, problem, figures


def _problem(experiment: Experiment, walk: Walk, stages: Stages, options: Sequence[Option]) -> Allocation:
    """Measure what each layer costs at each option, where the allocator needs it."""
    source = walk.source
    shapes = source.layer_shapes()
    costs: dict[str, dict[Option, float]] = {}
    if experiment.allocator.needs_costs:
        statistics = _statistics(experiment, walk, stages, options)
        costs = with_unseen(
            {name: {option: experiment.metric.cost(statistics[name], option) for option in options} for name in shapes}
        )
    sizes = {
        name: {option: storage_bits(experiment.format, option, shape) for option in options}
        for name, shape in shapes.items()
    }
    return Allocation(shapes=shapes, options=options, costs=costs, storage_bits=sizes, other_bytes=source.other_bytes)


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
    return {**origin, **{f"{which}_bits": average for which, average in bits.items()}}


def average_bits(format: Format, shapes: Mapping[str, tuple[int, int]], plan: Mapping[str, Option]) -> dict[str, float]:
    """Return the averages in bits per quantized weight: codes alone, and all that is stored."""
    weights = {name: shapes[name][0] * shapes[name][1] for name in plan}
    code = sum(option.bits * weights[name] for name, option in plan.items())
    storage = sum(storage_bits(format, option, shapes[name]) for name, option in plan.items())
    return {"code": code / sum(weights.values()), "storage": storage / sum(weights.values())}


def _statistics(
    experiment: Experiment, walk: Walk, stages: Stages, options: Sequence[Option]
) -> Mapping[str, LayerStatistics]:
    """Return what the metric goes by, from the cache where it is known."""
    metric, prefix = experiment.metric, experiment.measure_option
    errors = options if metric.needs_errors else ()
    rounded = [experiment.config["quantizer"], experiment.config["format"], errors, prefix]
    parts = {**measured(experiment, walk), "rounding": rounded if errors or prefix else None}
    rounding = Rounding(quantizer=experiment.quantizer, format=experiment.format, errors=errors, prefix=prefix)
    if not isinstance(metric, LossMetric):
        return _measure(experiment, walk, stages, rounding, content_key(parts))
    loss = [metric.labels, metric.seed, metric.samples]
    cache = StatisticsCache(experiment.cache_dir / "statistics", content_key({**parts, "loss": loss}))
    found = cache.load_all(walk.source.num_steps)
    if found is None:
        roundings = Roundings(experiment.cache_dir / "roundings" / content_key(parts), experiment.fabric)
        statistics = _measure(experiment, walk, stages, rounding, content_key(parts), roundings)
        with stages(GRADIENTS, 2 * len(walk.source.block_names), "block"):
            score(
                walk,
                metric,
                statistics,
                format=experiment.format,
                roundings=roundings,
                cache=cache,
                callbacks=experiment.callbacks,
                stage=GRADIENTS,
            )
        roundings.remove()
        found = cache.load_all(walk.source.num_steps)
    if found is None:
        raise RuntimeError(f"{cache.folder / cache.key} was emptied while it was being filled")
    return found


def _measure(
    experiment: Experiment,
    walk: Walk,
    stages: Stages,
    rounding: Rounding,
    key: str,
    roundings: Roundings | None = None,
) -> dict[str, LayerStatistics]:
    with stages(MEASURE, walk.source.num_steps, "block"):
        return measure(
            walk,
            experiment.estimator,
            layers=list(walk.source.layer_shapes()),
            rounding=rounding,
            cache=StatisticsCache(experiment.cache_dir / "statistics", key),
            callbacks=experiment.callbacks,
            roundings=roundings,
        )


def measured(experiment: Experiment, walk: Walk) -> dict[str, Any]:
    """Return what all that is measured on the calibration samples depends on, for a key of the cache."""
    return {
        "model": walk.source.fingerprint(),
        "code": code_fingerprint(),
        "samples": samples_key(walk),
        "hessian": experiment.config["hessian"],
        "precision": experiment.config["fabric"]["precision"],
    }


def samples_key(walk: Walk) -> str:
    """Return a digest of all calibration samples."""
    return content_key({"shape": list(walk.samples.shape), "tokens": walk.samples.tolist()})
