"""The plan that is measured to be best, of many near the one that is predicted to be."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from aptq.allocators.choices import Budgeted, Choices
from aptq.allocators.exact import solve
from aptq.allocators.perturbation import perturbation
from aptq.allocators.relaxation import relaxed
from aptq.api import Allocation, AptqError, Option, PlanJudge

_log = logging.getLogger(__name__)

_SHRINK = 0.7
"""What the spread is multiplied by after a round that found nothing better."""


@dataclass(frozen=True)
class Measured(Budgeted):
    """Search for the plan with the least measured divergence, from the one with the least predicted cost on.

    An evolution strategy over log factors ``z`` on the predicted costs, one a unit and one an option: each round draws
    ``plans`` of them around a centre, solves the knapsack for the costs that they make, and has the plans measured
    side by side on ``samples`` of the calibration samples. The centre moves by the better half of the draws, the best
    ones weighing most; after a round without a better plan the spread shrinks. So every plan is within the budget and
    a good one for some sensitivities near those predicted. What the additive model cannot know (2-bit steps that are
    not small, errors that add up in a kind of layer or along the depth) is learnt. The plan of the predicted costs, and
    the uniform ones that the budget allows, are measured too, and the best of all is taken.

    Options: ``rounds`` and ``plans`` of each; ``minutes`` after which no new round is begun; ``samples``; ``spread``,
    standard deviation of a log factor's three influences (``perturbation``) in the first round; ``seed``; and those of
    ``Budgeted``.

    Source: recombination with logarithmic weights is Hansen and Ostermeier's, "Completely derandomized
    self-adaptation in evolution strategies", Evolutionary Computation 9(2), 2001; measuring plans, EXL2's.
    """

    rounds: int = 4
    plans: int = 16
    minutes: float | None = None
    samples: int = 4
    spread: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("rounds", 1), ("plans", 2), ("samples", 1)):
            if getattr(self, name) < least:
                raise AptqError(f"allocator.{name}={getattr(self, name)} is not allowed; use {least} or more.")
        if self.minutes is not None and self.minutes <= 0:
            raise AptqError(f"allocator.minutes={self.minutes} is not allowed; it is a time above 0, or null for none.")
        if not 0 < self.spread < float("inf"):
            raise AptqError(f"allocator.spread={self.spread} is not allowed; it is a standard deviation above 0.")

    @property
    def calls(self) -> int:
        """One a round, and one for the plans that it begins with."""
        return self.rounds + 1

    def allocate(self, problem: Allocation) -> dict[str, Option]:
        """Return the best plan that was measured.

        Raises:
            AptqError: the budget cannot be kept, or the costs give nothing to choose by; there is no judge.
        """
        if problem.judge is None:
            raise AptqError("allocator=measured needs a model to measure plans on; for costs alone use knapsack.")
        table = self.choices(problem)
        search = _Search(table, problem.judge)
        predicted = solve(table)
        search.measure([predicted, *_uniform(table)])
        first = search.figure(predicted)
        rng = np.random.default_rng(self.seed)
        centre, spread = np.zeros_like(table.costs), self.spread
        weights = _recombination(self.plans)
        for _ in range(self.rounds):
            if self.minutes is not None and problem.judge.seconds >= 60 * self.minutes:
                break
            before = search.least
            draws = [spread * _draw(problem, table, rng) for _ in range(self.plans)]
            found = [relaxed(replace(table, costs=table.costs * np.exp(centre + draw)))[0] for draw in draws]
            search.measure(found)
            ranked = sorted(range(self.plans), key=lambda number: search.figure(found[number]))
            centre = centre + sum(weight * draws[at] for weight, at in zip(weights, ranked, strict=False))
            if search.least >= before:
                spread *= _SHRINK
        _log.info(
            "Of %d plans the best one is measured at %.4f nats per token; that of the predicted costs at %.4f.",
            len(search.figures),
            search.least,
            first,
        )
        return table.plan(search.best)


@dataclass
class _Search:
    """The plans that were measured, each once."""

    table: Choices
    judge: PlanJudge
    figures: dict[bytes, float] = field(default_factory=dict)
    best: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    least: float = float("inf")

    def measure(self, plans: Sequence[NDArray[np.int64]]) -> None:
        """Measure those that are new."""
        new = {plan.tobytes(): plan for plan in plans if plan.tobytes() not in self.figures}
        values = self.judge([self.table.plan(plan) for plan in new.values()]) if new else []
        for (key, plan), value in zip(new.items(), values, strict=True):
            self.figures[key] = value
            if value < self.least or not len(self.best):
                self.best, self.least = plan, value

    def figure(self, plan: NDArray[np.int64]) -> float:
        """Return what a plan was measured at."""
        return self.figures[plan.tobytes()]


def _uniform(table: Choices) -> list[NDArray[np.int64]]:
    """Return the plans of one option for all layers: the largest within the limit, for each format and group size."""
    fitting: dict[tuple[str, int], NDArray[np.int64]] = {}
    for column, option in enumerate(table.options):
        plan = np.full(len(table.costs), column, dtype=np.int64)
        if not np.isfinite(table.cost(plan)) or table.size(plan) > table.limit:
            continue
        known = fitting.get((option.format, option.group_size))
        if known is None or table.size(plan) > table.size(known):
            fitting[option.format, option.group_size] = plan
    return list(fitting.values())


def _draw(problem: Allocation, table: Choices, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a change of the logarithm of all costs, ``[units, options]``."""
    units = perturbation(problem, rng)
    return units[:, None] + rng.normal(size=len(table.options))[None]


def _recombination(plans: int) -> NDArray[np.float64]:
    """Return the weights of the better half of the draws, from the best one down; their sum is 1."""
    half = plans // 2
    weights: NDArray[np.float64] = np.log(half + 0.5) - np.log(np.arange(1, half + 1, dtype=np.float64))
    return weights / float(weights.sum())
