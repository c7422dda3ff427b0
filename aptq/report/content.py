"""What a report tells, gathered from the files of a run folder."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aptq.api import LayerReport, Option
from aptq.metrics_schema import measures, scored
from aptq.names import place
from aptq.plan import option_labels
from aptq.report.sensitivity import Audit, Costs, TradeOff, audit_of, trade_off
from aptq.run import Run
from aptq.run_folder import CONFIG

_WORST = 10
_EVENTS = 200


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One figure of an evaluator, before and after, with standard errors where they are known."""

    measure: str
    text: str
    before: float | None
    after: float | None
    has_before: bool
    before_error: float | None = None
    after_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One field of a map: ``level`` from 0 to 1 is its colour."""

    label: str
    level: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Map:
    """A figure for each kind of layer (rows) at each depth (columns); None where a block has no such layer."""

    kinds: list[str]
    depths: list[int]
    values: list[list[float | None]]
    cells: list[list[Cell | None]]
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Width:
    """How many layers, and which share of the weights where shapes are known, are stored so."""

    label: str
    layers: int
    share: float | None
    level: float


@dataclass(frozen=True, kw_only=True)
class BackendUse:
    """The layers that a backend multiplied when the result was evaluated."""

    name: str
    layers: int
    widths: list[tuple[str, int]]  # label and number of layers
    refusals: list[tuple[str, str]]  # who was asked before, and why it refused


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of the run: how long it took, and the most memory that the process had in it."""

    name: str
    seconds: float
    memory: int | None  # resident bytes; None in runs of older versions
    device_memory: int | None  # None where there is no device beside the CPU


@dataclass(frozen=True, kw_only=True)
class Content:
    """Everything on the page."""

    title: str
    model: str
    finished: bool
    judged: list[Judged]
    metrics: Mapping[str, Any]  # empty while the run is not finished
    budget: Mapping[str, Any]
    stages: list[Stage]
    layers: list[LayerReport]
    bits: Map | None
    errors: Map | None
    costs: list[tuple[str, Map]]  # predicted, a weight, by option, from the fewest bits on
    trade_off: TradeOff | None
    audit: Audit | None
    widths: list[Width]
    outside: list[tuple[str, int]]  # layers outside the blocks, with their bits
    worst: list[LayerReport]
    mended: list[LayerReport]
    more_mended: int
    dampings: list[tuple[float, int]]
    backends: list[BackendUse]
    config: str


def collect(run: Run) -> Content:
    """Read a run folder."""
    metrics = run.metrics() if run.finished else {}
    layers, plan = run.layers(), run.plan()
    options = {report.name: Option(report.bits, report.group_size, report.format) for report in layers}
    if plan is not None and not options:
        options = dict(plan.layers)
    bits = {name: float(option.bits) for name, option in options.items()}
    weights = {report.name: report.out_features * report.in_features for report in layers}
    sensitivity = run.sensitivity()
    errors = {report.name: report.relative_error for report in layers if math.isfinite(report.relative_error)}
    by_error = sorted(layers, key=lambda report: -report.relative_error)
    mended = [report for report in layers if report.events]
    model = run.config.get("model")
    return Content(
        title=" / ".join(run.folder.absolute().parts[-2:]),
        model=str(model.get("path", "")) if isinstance(model, Mapping) else "",
        finished=run.finished,
        judged=_judged(metrics),
        metrics=metrics,
        budget=plan.budget if plan is not None else {},
        stages=_stages(metrics),
        layers=layers,
        bits=_map(bits, _tell_bits, logarithmic=False),
        errors=_map(errors, lambda value: f"{value:.2e}", logarithmic=True),
        costs=_costs(sensitivity, weights),
        trade_off=None if plan is None else trade_off(sensitivity, plan.layers, weights),
        audit=audit_of(metrics),
        widths=_widths(options, weights),
        outside=[(name, int(value)) for name, value in bits.items() if place(name)[0] is None],
        worst=[report for report in by_error if report.name in errors][:_WORST],
        mended=mended[:_EVENTS],
        more_mended=max(0, len(mended) - _EVENTS),
        dampings=sorted(Counter(report.damping for report in layers).items()),
        backends=_backends(metrics),
        config=(run.folder / CONFIG).read_text(encoding="utf-8"),
    )


def _costs(sensitivity: Costs, weights: Mapping[str, int]) -> list[tuple[str, Map]]:
    """Return what each layer is predicted to cost per weight, a map for each option that has costs."""
    maps = []
    for option, label in option_labels({option for options in sensitivity.values() for option in options}).items():
        costs = {
            name: options[option][1] / weights[name]
            for name, options in sensitivity.items()
            if name in weights and option in options and options[option][1] > 0
        }
        if (drawn := _map(costs, lambda value: f"{value:.2e}", logarithmic=True)) is not None:
            maps.append((label, drawn))
    return maps


def _stages(metrics: Mapping[str, Any]) -> list[Stage]:
    """Return the stages, the longest first."""
    memory = metrics.get("memory", {})
    found = [
        Stage(
            name=name,
            seconds=seconds,
            memory=memory.get(name, {}).get("peak_rss_bytes"),
            device_memory=memory.get(name, {}).get("peak_device_bytes"),
        )
        for name, seconds in metrics.get("seconds", {}).items()
    ]
    return sorted(found, key=lambda stage: -stage.seconds)


def _judged(metrics: Mapping[str, Any]) -> list[Judged]:
    found = []
    for measure in measures(metrics):
        originals = scored(metrics, measure, original=True)
        for text, (after, after_error) in scored(metrics, measure).items():
            before, before_error = originals.get(text, (None, None))
            found.append(
                Judged(
                    measure=measure,
                    text=text,
                    before=before,
                    after=after,
                    has_before=text in originals,
                    before_error=before_error,
                    after_error=after_error,
                )
            )
    return found


def _backends(metrics: Mapping[str, Any]) -> list[BackendUse]:
    used = metrics.get("backends", [])
    counts = [
        {Option(each["bits"], each["group_size"], each["format"]): each["layers"] for each in one["options"]}
        for one in used
    ]
    labels = option_labels(option for each in counts for option in each)
    return [
        BackendUse(
            name=one["backend"],
            layers=one["layers"],
            widths=[(labels[option], number) for option, number in each.items()],
            refusals=[(other, reason) for other, reasons in one["refusals"].items() for reason in reasons],
        )
        for one, each in zip(used, counts, strict=True)
    ]


def _map(values: Mapping[str, float], tell: Callable[[float], str], *, logarithmic: bool) -> Map | None:
    """Lay figures of layers out by kind and depth; layers that share a place (experts) by their mean."""
    places: dict[tuple[str, int], list[float]] = {}
    for name, value in values.items():
        depth, kind = place(name)
        if depth is not None:
            places.setdefault((kind, depth), []).append(value)
    if not places:
        return None
    kinds = list(dict.fromkeys(kind for kind, _ in places))
    depths = sorted({depth for _, depth in places})
    means = {key: sum(items) / len(items) for key, items in places.items()}
    grid = [[means.get((kind, depth)) for depth in depths] for kind in kinds]
    level = _levels(means.values(), logarithmic)

    def cell(kind: str, depth: int, value: float | None) -> Cell | None:
        if value is None:
            return None
        return Cell(label=f"{kind}, block {depth}: {tell(value)}", level=level(value), text=f"{value:.3g}")

    cells = [
        [cell(kind, depth, value) for depth, value in zip(depths, row, strict=True)]
        for kind, row in zip(kinds, grid, strict=True)
    ]
    return Map(kinds=kinds, depths=depths, values=grid, cells=cells, low=min(means.values()), high=max(means.values()))


def _levels(values: Iterable[float], logarithmic: bool) -> Callable[[float], float]:
    """Return a function that spreads the values over 0 to 1."""
    floor = min((value for value in values if value > 0), default=1.0)

    def scale(value: float) -> float:
        return math.log(max(value, floor)) if logarithmic else value

    low, high = min(map(scale, values)), max(map(scale, values))
    return lambda value: round((scale(value) - low) / (high - low), 3) if high > low else 0.5


def _widths(options: Mapping[str, Option], weights: Mapping[str, int]) -> list[Width]:
    total = sum(weights.values())
    level = _levels([float(option.bits) for option in options.values()] or [0.0], False)
    layers = Counter(options.values())
    return [
        Width(
            label=label,
            layers=layers[each],
            share=sum(weights[name] for name, option in options.items() if option == each) / total if total else None,
            level=level(float(each.bits)),
        )
        for each, label in option_labels(options.values()).items()
    ]


def _tell_bits(value: float) -> str:
    return f"{value:.3g} bits"
