"""What the model's loss makes of rounding each layer, on the way back through the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from aptq.api import Block, Callback, LayerStatistics, LossChange, LossMetric, Option
from aptq.calibration.backward import LOSSES, BackwardPass, Seen
from aptq.calibration.coding import Coding
from aptq.calibration.roundings import Roundings
from aptq.calibration.statistics import StatisticsCache
from aptq.calibration.walk import Walk

_TOKENS = 2048
"""Of a layer that are scored together: for all of them its weight is unpacked at every option only once."""


def score(
    walk: Walk,
    metric: LossMetric,
    statistics: Mapping[str, LayerStatistics],
    *,
    coding: Coding,
    roundings: Roundings,
    cache: StatisticsCache,
    callbacks: Callback,
    stage: str,
) -> None:
    """Fill in the ``loss_changes`` of statistics, block by block, and leave the result in ``cache``.

    The full-precision model runs forwards and backwards over the metric's samples, one at a time. Interrupted, it goes
    on at the block that the way back had come to.

    Args:
        walk: over all calibration samples.
        statistics: of every layer, as ``measure`` gave them.
        coding: of the ``roundings`` that ``measure`` left, which are not needed any more afterwards.
    """
    few = walk.beginning(metric.samples)
    tap = _Scores(few, metric, statistics, coding, roundings, cache)
    folder: Path = cache.folder / cache.key
    passing = BackwardPass(walk=few, tap=tap, folder=folder, callbacks=callbacks, stage=stage)
    reached = passing.reached()
    if reached is not None and any(cache.load(index) is None for index in range(reached, walk.source.num_steps)):
        passing.forget()  # of another life of the cache
    passing.run()
    walk.fabric.barrier()  # the first rank writes


@dataclass
class _Scores:
    """Adds up what the loss makes of a block's layers."""

    walk: Walk
    metric: LossMetric
    statistics: Mapping[str, LayerStatistics]
    coding: Coding
    roundings: Roundings
    cache: StatisticsCache
    _block: Block | None = None
    _packed: Mapping[str, Mapping[Option, Mapping[str, Tensor]]] = field(default_factory=dict)
    _sums: dict[str, Tensor] = field(default_factory=dict)  # layer -> [options, 3], float64
    _held: dict[str, list[Seen]] = field(default_factory=dict)  # layer -> what was not scored yet

    @property
    def labels(self) -> str:
        return self.metric.labels

    @property
    def seed(self) -> int:
        return self.metric.seed

    def modules(self, block: Block) -> Iterable[str]:
        return [name for name in block.layers if name in self.statistics]

    def begin(self, block: Block) -> None:
        self._block, self._packed = block, self.roundings.load(block)
        device = self.walk.fabric.device
        self._sums = {
            name: torch.zeros(len(options), 3, dtype=torch.float64, device=device)
            for name, options in self._packed.items()
        }

    def add(self, seen: Mapping[str, Seen], samples: Sequence[int]) -> None:
        del samples
        for name, passed in seen.items():
            held = self._held.setdefault(name, [])
            held.append(passed)
            # What is absolute needs a gradient of the weight's size for each sample: one at a time.
            if self.metric.needs_absolute or sum(each.inputs[..., 0].numel() for each in held) >= _TOKENS:
                self._take(name)

    def _take(self, name: str) -> None:
        """Score what is held of a layer."""
        held = self._held.pop(name)
        differences = (self._difference(name, option) for option in self._packed[name])
        self._sums[name] += loss_changes(held, differences, absolute=self.metric.needs_absolute)

    def _difference(self, name: str, option: Option) -> Tensor:
        assert self._block is not None
        layer = self._block.layers[name]
        return layer.weight().float() - self.coding.restored(self._packed[name][option], option, layer.shape)

    def finish(self) -> None:
        assert self._block is not None
        for name in list(self._held):
            self._take(name)
        if self.walk.fabric.world_size > 1:
            for name in sorted(self._sums):
                dist.all_reduce(self._sums[name])
        tokens = len(LOSSES[self.labels]) * self.walk.samples.numel()
        rows = []
        for name in self.modules(self._block):
            figures = (self._sums[name] / tokens).tolist()
            changes = {
                option: LossChange(
                    channels=channels, tokens=whole, absolute=absolute if self.metric.needs_absolute else None
                )
                for option, (channels, whole, absolute) in zip(self._packed[name], figures, strict=True)
            }
            rows.append(replace(self.statistics[name], loss_changes=changes))
        if self.walk.fabric.global_rank == 0:
            self.cache.save(self._block.index, rows)
        self._block, self._packed = None, {}


def loss_changes(batches: Sequence[Seen], differences: Iterable[Tensor], *, absolute: bool = True) -> Tensor:
    """Return the sums of ``LossChange`` over tokens and losses, before they are divided by both.

    Args:
        batches: what passed through the layer: ``inputs [..., in]``, ``gradient [losses, ..., out]``. The absolute
            change is taken of each batch by itself.
        differences: of the weight, ``[out, in]`` each.
        absolute: whether the last column is wanted; 0 if not.

    Returns:
        ``[differences, 3]``, float64: ``channels``, ``tokens``, ``absolute``.
    """
    flat = [(each.inputs.flatten(0, -2).float(), each.gradient.flatten(1, -2).float()) for each in batches]
    by_weight = [g.T @ x for x, losses in flat for g in losses] if absolute else []
    rows = []
    for difference in differences:
        row = torch.zeros(3, dtype=torch.float64, device=difference.device)
        for x, losses in flat:
            error = x @ difference.T
            for g in losses:
                moved = error * g
                row[0] += moved.square().sum(dtype=torch.float64) / 2
                row[1] += moved.sum(1).square().sum(dtype=torch.float64) / 2
        for each in by_weight:
            row[2] += each.mul(difference).abs_().sum(dtype=torch.float64)
        rows.append(row)
    return torch.stack(rows)
