"""How far a metric's predictions can be trusted: held against what plans are measured to do."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from aptq.allocators.choices import Choices, stored_sizes
from aptq.allocators.perturbation import perturbation
from aptq.allocators.relaxation import relaxed
from aptq.api import Allocation, Option

_log = logging.getLogger(__name__)

CHOSEN, UNIFORM, RANDOM = "chosen", "uniform", "random"
"""Why a plan is audited."""

_SPREAD = 1.5
"""Largest standard deviation of random log sensitivities: about one bit more or less, for each of three influences."""

_SMALLEST = 0.5
"""Of what a budget allows beyond the smallest plan of all, the share that a random plan may use at least."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan that is audited, and why."""

    kind: str  # CHOSEN, UNIFORM or RANDOM
    plan: Mapping[str, Option]


def candidates(problem: Allocation, chosen: Mapping[str, Option], count: int, seed: int) -> list[Candidate]:
    """Return the chosen plan, the best uniform one that is no larger, and ``count`` random ones that are no larger.

    A random plan is the best one for sensitivities that are drawn for each kind of layer, along the depth and for each
    layer by itself, more and more different ones: from plans that are nearly uniform to wild ones. Its size is drawn
    as well, so that a metric has to tell more than a plan's size does.
    """
    size = _stored(problem, chosen)
    found = [Candidate(kind=CHOSEN, plan=chosen)]
    uniform = [dict.fromkeys(problem.shapes, option) for option in problem.options]
    fitting = [plan for plan in uniform if _stored(problem, plan) <= size and plan != dict(chosen)]
    if fitting:
        found.append(Candidate(kind=UNIFORM, plan=max(fitting, key=lambda plan: _stored(problem, plan))))
    rng = np.random.default_rng(seed)
    spreads = [_SPREAD * (number + 1) / count for number in range(count)]
    smallest = int(stored_sizes(problem).min(axis=1).sum())
    for spread in spreads:
        limit = smallest + math.ceil(rng.uniform(_SMALLEST, 1.0) * (size - smallest))
        found.append(Candidate(kind=RANDOM, plan=_random_plan(problem, limit, rng, spread)))
    return found


def _random_plan(problem: Allocation, limit: int, rng: np.random.Generator, spread: float) -> dict[str, Option]:
    sensitivities = np.exp(spread * perturbation(problem, rng))
    units, options = problem.units(), list(problem.options)
    weights = np.array([sum(map(problem.num_weights, unit)) for unit in units])
    noise = 4.0 ** -np.array([option.bits for option in options], dtype=np.float64)
    costs = (sensitivities * weights)[:, None] * noise
    table = Choices(units=units, options=options, costs=costs, sizes=stored_sizes(problem), limit=limit)
    return table.plan(relaxed(table)[0])


def _stored(problem: Allocation, plan: Mapping[str, Option]) -> int:
    return sum(problem.storage_bits[name][option] for name, option in plan.items())


def audit(problem: Allocation, audited: Sequence[Candidate], measured: Sequence[float]) -> dict[str, Any]:
    """Return the figures of an audit and warn where the metric is no guide.

    Returns:
        ``spearman``: rank correlation of predicted cost and measured divergence over all different plans but the
        chosen one, which was picked by the prediction; ``size_spearman``: that of a plan's size, with the sign of
        "smaller is worse"; ``slope``: of the least-squares line through the origin, measured over predicted;
        ``plans``: kind, predicted, measured and stored bits a weight of each.
    """
    total = problem.total_weights
    rows = [
        {
            "kind": each.kind,
            "predicted": sum(problem.costs[name][option] for name, option in each.plan.items()),
            "measured": figure,
            "storage_bits": _stored(problem, each.plan) / total,
        }
        for each, figure in zip(audited, measured, strict=True)
    ]
    distinct: dict[frozenset[tuple[str, Option]], dict[str, Any]] = {}  # a random plan may be the uniform one again
    for each, row in zip(audited, rows, strict=True):
        distinct.setdefault(frozenset(each.plan.items()), row)
    others = [row for row in distinct.values() if row["kind"] != CHOSEN]
    predicted, found = ([float(row[key]) for row in others] for key in ("predicted", "measured"))
    spearman = _correlation(predicted, found)
    by_size = _correlation([-float(row["storage_bits"]) for row in others], found)
    squares = sum(value**2 for value in predicted)
    slope = sum(a * b for a, b in zip(predicted, found, strict=True)) / squares if squares else None
    if spearman is not None and spearman <= max(by_size or 0.0, 0.3):
        _log.warning(
            "The metric orders plans no better than chance or their size does (Spearman %.2f, by size %.2f): its plan "
            "is not to be trusted. Use another metric, or more calibration samples.",
            spearman,
            by_size or 0.0,
        )
    return {"spearman": spearman, "size_spearman": by_size, "slope": slope, "plans": rows}


def _correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return Spearman's correlation; None where one side is all the same."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return float(spearmanr(one, other).statistic)


def preferred(audited: Sequence[Candidate], measured: Sequence[float]) -> Candidate:
    """Return the chosen plan, or the uniform one where that was measured to be better; say so."""
    figures = {each.kind: figure for each, figure in zip(audited, measured, strict=True) if each.kind != RANDOM}
    best = min((CHOSEN, UNIFORM), key=lambda kind: figures.get(kind, math.inf))
    if best != CHOSEN:
        _log.warning(
            "The plan is measured to be worse than the same bits everywhere (%.4f against %.4f nats per token), which "
            "are taken instead.",
            figures[CHOSEN],
            figures[UNIFORM],
        )
    return next(each for each in audited if each.kind == best)
