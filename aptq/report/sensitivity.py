"""What a plan was chosen by: predicted costs, what else they would have bought, and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from aptq.allocators.relaxation import efficient_steps
from aptq.api import Option
from aptq.plan import option_labels

Costs = Mapping[str, Mapping[Option, tuple[int, float]]]  # layer -> option -> stored bits, predicted cost


@dataclass(frozen=True, kw_only=True)
class Point:
    """A plan: stored bits a weight, and predicted cost."""

    label: str
    bits: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """The best cost for every size, and the plans to compare it with."""

    curve: list[tuple[float, float]]
    uniform: list[Point]
    chosen: Point


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Predicted against measured, in nats per token: of the chosen plan, the uniform one and random ones."""

    points: list[tuple[str, float, float]]  # kind, predicted, measured
    spearman: float | None
    size_spearman: float | None  # of "smaller is worse"
    slope: float | None


def trade_off(costs: Costs, plan: Mapping[str, Option], weights: Mapping[str, int]) -> TradeOff | None:
    """Return what the predicted costs give at every size; None where they do not say (none, or blind to bits)."""
    if not costs or set(costs) != set(plan) or set(weights) != set(plan):
        return None
    options = list(next(iter(costs.values())))
    size = np.array([[costs[name][option][0] for option in options] for name in plan], dtype=np.int64)
    cost = np.array([[costs[name][option][1] for option in options] for name in plan], dtype=np.float64)
    if not np.isfinite(cost).all() or not np.ptp(cost, axis=1).any():
        return None
    total = sum(weights.values())
    steps = efficient_steps(cost, size)
    first_size = int(np.take_along_axis(size, steps.start[:, None], axis=1).sum())
    first_cost = float(np.take_along_axis(cost, steps.start[:, None], axis=1).sum())
    sizes = first_size + np.concatenate([[0], np.cumsum(steps.size)])
    values = first_cost - np.concatenate([[0.0], np.cumsum(steps.saving)])
    labels = option_labels(options)
    columns = np.array([options.index(plan[name]) for name in plan])
    return TradeOff(
        curve=[(float(bits) / total, float(value)) for bits, value in zip(sizes, values, strict=True)],
        uniform=[
            Point(label=labels[option], bits=float(size[:, at].sum()) / total, cost=float(cost[:, at].sum()))
            for at, option in enumerate(options)
        ],
        chosen=Point(
            label="chosen",
            bits=float(np.take_along_axis(size, columns[:, None], axis=1).sum()) / total,
            cost=float(np.take_along_axis(cost, columns[:, None], axis=1).sum()),
        ),
    )


def audit_of(metrics: Mapping[str, Any]) -> Audit | None:
    """Return the audit in a run's metrics, if it has one with its plans."""
    found = metrics.get("audit")
    rows = found.get("plans") if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(rows, list):
        return None
    points = [
        (str(row["kind"]), float(row["predicted"]), float(row["measured"]))
        for row in rows
        if isinstance(row, Mapping) and row.keys() >= {"kind", "predicted", "measured"}
    ]
    if not points:
        return None
    figures = {key: found.get(key) for key in ("spearman", "size_spearman", "slope")}
    return Audit(points=points, **figures)
