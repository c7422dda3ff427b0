"""Plans held against the model, for all who ask: each is measured once, also when a run is taken up again."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

import torch

from aptq.api import Option
from aptq.calibration.coding import Coding
from aptq.calibration.divergence import measure_divergence
from aptq.calibration.roundings import Roundings
from aptq.calibration.statistics import content_key
from aptq.calibration.walk import Walk
from aptq.files import write_json
from aptq.metrics_schema import finite


class PlanMeter:
    """Measures what plans do to the predictions (``aptq.api.PlanJudge``) and keeps the figures in a file."""

    def __init__(
        self,
        few: Walk,
        roundings: Roundings,
        coding: Coding,
        *,
        path: Path,
        last_tokens: int | None = None,
        on_block: Callable[[float, str], None],
    ) -> None:
        """Take a walk over the samples to measure on, and where figures are kept.

        Args:
            few: ``Walk.beginning``.
            roundings: of every layer at every option.
            path: of the figures, named by all that they depend on but the plans.
            last_tokens: how many predictions of each sample are compared; all by default.
            on_block: told how many calls are done, with the share of the present one, and the block's name.
        """
        self._few, self._roundings, self._coding = few, roundings, coding
        self._path, self._last_tokens, self._on_block = path, last_tokens, on_block
        self._calls = 0
        self.seconds = 0.0
        few.fabric.barrier()  # what another meter has written is there
        self._known = _read(path)
        few.fabric.barrier()  # all have read before this one writes

    def __call__(self, plans: Sequence[Mapping[str, Option]]) -> list[float]:
        """Return each plan's divergence from the original's predictions, in nats per token."""
        started = time.perf_counter()
        keys = [content_key({name: astuple(option) for name, option in plan.items()}) for plan in plans]
        new = {key: plan for key, plan in zip(keys, plans, strict=True) if key not in self._known}
        if new:
            figures = measure_divergence(
                self._few,
                self._roundings,
                self._coding,
                list(new.values()),
                last_tokens=self._last_tokens,
                on_block=lambda share, name: self._on_block(self._calls + share, name),
            )
            self._known.update(zip(new, figures, strict=True))
            if self._few.fabric.global_rank == 0:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._path, finite(self._known))
        self._calls += 1
        taken = torch.tensor(time.perf_counter() - started)
        self.seconds += float(self._few.fabric.broadcast(taken))
        return [self._known[key] for key in keys]


def _read(path: Path) -> dict[str, float]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return {str(key): math.inf if value is None else float(value) for key, value in found.items()}
