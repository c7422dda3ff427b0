"""Pass 1 on the way back: what every layer is like, and what the model's loss makes of rounding it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from aptq.api import Block, Callback, HessianEstimator, LayerStatistics, LossChange, LossMetric, Option
from aptq.calibration.backward import BackwardPass, Seen
from aptq.calibration.distribute import broadcast_tensors
from aptq.calibration.measure import Rounding, gather, measure_layers
from aptq.calibration.statistics import StatisticsCache
from aptq.calibration.walk import Step, Walk

STAGE = "measure"


def score(
    walk: Walk,
    estimator: HessianEstimator,
    metric: LossMetric,
    *,
    layers: Sequence[str],
    rounding: Rounding,
    cache: StatisticsCache,
    callbacks: Callback,
) -> dict[str, LayerStatistics]:
    """Return the statistics of ``layers`` by name with their ``loss_changes``, in the order of the model.

    Every layer is rounded at each of ``rounding.errors`` on what the full-precision model feeds it. Blocks whose
    statistics are cached are not measured again, and when all are, the model is not walked at all.
    """
    num_blocks = walk.source.num_steps
    walk = walk.one_by_one()  # gradients by the weights are taken sample by sample
    tap = _Scores(walk, estimator, metric, frozenset(layers), rounding, cache)
    passing = BackwardPass(walk=walk, tap=tap, folder=cache.folder / cache.key, callbacks=callbacks, stage=STAGE)
    reached = passing.reached()
    if reached is not None and any(cache.load(index) is None for index in range(reached, num_blocks)):
        passing.forget()
    if reached is not None or any(cache.load(index) is None for index in range(num_blocks)):
        passing.run()
    walk.fabric.barrier()  # the first rank writes
    rows = [cache.load(index) or [] for index in range(num_blocks)]
    return {entry.name: entry for found in rows for entry in found}


@dataclass
class _Scores:
    """Rounds a block's layers and adds up what the loss makes of it."""

    walk: Walk
    estimator: HessianEstimator
    metric: LossMetric
    wanted: Collection[str]
    rounding: Rounding
    cache: StatisticsCache
    _block: Block | None = None
    _rows: list[LayerStatistics] = field(default_factory=list)
    _packed: dict[str, dict[Option, dict[str, Tensor]]] = field(default_factory=dict)
    _sums: dict[str, Tensor] = field(default_factory=dict)  # layer -> [options, 3], float64

    @property
    def labels(self) -> str:
        return self.metric.labels

    @property
    def seed(self) -> int:
        return self.metric.seed

    def modules(self, block: Block) -> Iterable[str]:
        return [name for name in block.layers if name in self.wanted]

    def wants(self, sample: int) -> bool:
        return sample < self.metric.samples

    def begin(self, step: Step) -> None:
        options, walk, format = self.rounding.errors, self.walk, self.rounding.format
        rows, observed, packed = measure_layers(step, self.estimator, walk, self.wanted, self.rounding, options)
        self._block, self._rows = step.block, gather(rows, step.block, walk.fabric.world_size)
        self._packed = {name: {} for name in self.modules(step.block)}
        for name, owner in observed.owners.items():
            if name in self._packed:
                for option in options:
                    layout = format.packed_layout(option, step.block.layers[name].shape)
                    mine = packed[name].pop(option) if name in packed else None
                    self._packed[name][option] = broadcast_tensors(mine, layout, owner, walk.fabric)
        zeros = torch.zeros(len(options), 3, dtype=torch.float64, device=walk.fabric.device)
        self._sums = {name: zeros.clone() for name in self._packed}

    def add(self, seen: Mapping[str, Seen], samples: Sequence[int]) -> None:
        del samples
        for name, passed in seen.items():
            differences = (self._difference(name, option) for option in self.rounding.errors)
            self._sums[name] += loss_changes(passed.inputs, passed.gradient, differences)

    def _difference(self, name: str, option: Option) -> Tensor:
        assert self._block is not None
        layer, format = self._block.layers[name], self.rounding.format
        quantized = format.unpack(self._packed[name][option], option, layer.shape)
        return layer.weight().float() - format.dequantize(quantized, option)

    def finish(self) -> None:
        assert self._block is not None
        length = self.walk.samples.shape[1]
        tokens = min(self.metric.samples, len(self.walk.samples)) * length
        if self.walk.fabric.world_size > 1:
            for total in self._sums.values():
                dist.all_reduce(total)
        rows = []
        for row in self._rows:
            figures = (self._sums[row.name] / tokens).tolist()
            changes = {
                option: LossChange(channels=channels, tokens=tokens, absolute=absolute)
                for option, (channels, tokens, absolute) in zip(self.rounding.errors, figures, strict=True)
            }
            rows.append(replace(row, loss_changes=changes))
        if self.walk.fabric.global_rank == 0:
            self.cache.save(self._block.index, rows)
        self._block, self._packed = None, {}


def loss_changes(inputs: Tensor, gradient: Tensor, differences: Iterable[Tensor]) -> Tensor:
    """Return the sums of ``LossChange`` over one sample's tokens, before they are divided by their number.

    Args:
        inputs: ``[..., in]``, what the layer was fed.
        gradient: ``[..., out]``, the loss's gradient at its output.
        differences: of the weight, ``[out, in]`` each.

    Returns:
        ``[differences, 3]``, float64: ``channels``, ``tokens``, ``absolute``.
    """
    x, g = inputs.flatten(0, -2).float(), gradient.flatten(0, -2).float()
    by_weight = g.T @ x
    rows = []
    for difference in differences:
        moved = (x @ difference.T).mul_(g)
        rows.append(
            torch.stack(
                [
                    moved.square().sum(dtype=torch.float64) / 2,
                    moved.sum(1).square().sum(dtype=torch.float64) / 2,
                    by_weight.mul(difference).abs().sum(dtype=torch.float64),
                ]
            )
        )
    return torch.stack(rows)
