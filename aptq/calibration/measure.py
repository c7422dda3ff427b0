"""Pass 1: what every layer is like, on the inputs of the full-precision model or of one with rounded blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from aptq.api import (
    Block,
    Callback,
    Curvature,
    Format,
    HessianEstimator,
    Layer,
    LayerStatistics,
    Option,
    Quantizer,
    Transform,
)
from aptq.calibration.coding import Coding
from aptq.calibration.distribute import broadcast_tensors
from aptq.calibration.observe import Observed, observe
from aptq.calibration.rounding import Preparations, share_layer
from aptq.calibration.roundings import Roundings
from aptq.calibration.statistics import StatisticsCache
from aptq.calibration.walk import Step, Walk

STAGE = "measure"


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What pass 1 rounds, and with what.

    ``errors``: every layer at each of these options, to fill ``LayerStatistics.errors`` and ``distances``.
    ``prefix``: every block at this option once it has been observed, so that later blocks are measured on what a
    quantized model feeds them (APTQ, DAC 2024, algorithm 1, step 1); None leaves the model in full precision.
    """

    quantizer: Quantizer
    format: Format
    errors: Sequence[Option] = ()
    prefix: Option | None = None
    transform: Transform | None = None

    @property
    def coding(self) -> Coding:
        """How layers are stored."""
        return Coding(self.format, self.transform)


def measure(
    walk: Walk,
    estimator: HessianEstimator,
    *,
    layers: Sequence[str],
    rounding: Rounding,
    cache: StatisticsCache,
    callbacks: Callback,
    roundings: Roundings | None = None,
) -> dict[str, LayerStatistics]:
    """Return the statistics of ``layers`` by name, in the order of the model.

    Blocks whose statistics are cached are run but not measured again (with a ``prefix`` they are observed, to be
    rounded), and when all are, the model is not walked at all. With ``roundings`` every layer's packed tensors at
    ``rounding.errors`` are left there, and blocks of which it has none are measured again.
    """
    num_blocks = walk.source.num_steps
    cached = [cache.load(index) if roundings is None or roundings.has(index) else None for index in range(num_blocks)]
    if all(rows is not None for rows in cached):
        return {entry.name: entry for rows in cached if rows is not None for entry in rows}
    wanted = set(layers)
    statistics: dict[str, LayerStatistics] = {}
    for step in walk.steps():
        index = step.block.index
        callbacks.on_advance(stage=STAGE, done=index, detail=step.block.name)
        rows = cached[index]
        if index + 1 == num_blocks:  # it feeds no other block
            rounding = replace(rounding, prefix=None)
        if rows is None:
            rows = _measure_block(step, estimator, walk, wanted, rounding, roundings)
            if walk.fabric.global_rank == 0:
                cache.save(index, rows)
        elif rounding.prefix is not None:
            _measure_block(step, estimator, walk, wanted, replace(rounding, errors=()))
        else:
            step.run()
        statistics.update((entry.name, entry) for entry in rows)
        callbacks.on_block_end(stage=STAGE, index=index, metrics={})
    return statistics


def _measure_block(
    step: Step,
    estimator: HessianEstimator,
    walk: Walk,
    wanted: Collection[str],
    rounding: Rounding,
    roundings: Roundings | None = None,
) -> list[LayerStatistics]:
    """Measure a block's layers on their owner ranks; leave the block, and its outputs, rounded if there is a prefix."""
    keep = {*(rounding.errors if roundings else ()), *(() if rounding.prefix is None else (rounding.prefix,))}
    need_outputs = rounding.prefix is None
    rows, observed, packed = measure_layers(step, estimator, walk, wanted, rounding, keep, need_outputs=need_outputs)
    if roundings is not None:
        shared = share_packed(step.block, wanted, observed, packed, rounding.format, rounding.errors, walk)
        roundings.save(step.block, shared)
    if rounding.prefix is not None:
        for name, owner in observed.owners.items():
            if name in wanted:
                tensors = packed.get(name, {}).get(rounding.prefix)
                share_layer(step.block.layers[name], tensors, owner, rounding.coding, rounding.prefix, walk.fabric)
        step.run()
    return _gather(rows, step.block, walk.fabric.world_size)


def measure_layers(
    step: Step,
    estimator: HessianEstimator,
    walk: Walk,
    wanted: Collection[str],
    rounding: Rounding,
    keep: Collection[Option],
    *,
    need_outputs: bool,
) -> tuple[list[LayerStatistics], Observed, dict[str, dict[Option, dict[str, Tensor]]]]:
    """Observe a block and round the layers that this rank owns.

    Returns:
        their statistics; the layers' owners and curvatures; and the packed tensors of each, for the options to
        ``keep``, which are rounded even if no error is asked for.
    """
    observed = observe(step, estimator, walk, rounding.transform, need_outputs=need_outputs)
    prepared = Preparations(rounding.quantizer)
    rows: list[LayerStatistics] = []
    packed: dict[str, dict[Option, dict[str, Tensor]]] = {}
    for name, curvature in observed.curvatures.items():
        if name in wanted:
            prepared.keep([curvature])  # factors take as much memory as the curvature
            row, packed[name] = _measure_layer(step.block.layers[name], curvature, rounding, prepared, keep)
            rows.append(row)
    return rows, observed, packed


def _measure_layer(
    layer: Layer, curvature: Curvature, rounding: Rounding, prepared: Preparations, keep: Collection[Option]
) -> tuple[LayerStatistics, dict[Option, dict[str, Tensor]]]:
    """Return a layer's statistics and its packed tensors at the options to keep."""
    errors: dict[Option, float] = {}
    distances: dict[Option, float] = {}
    packed: dict[Option, dict[str, Tensor]] = {}
    format = rounding.format
    for option in dict.fromkeys([*rounding.errors, *keep]):
        weight = rounding.coding.weight(layer)
        rounded = rounding.quantizer.quantize(weight, prepared.of(curvature)[0], format, option).weight
        if option in rounding.errors:
            difference = weight - format.dequantize(rounded, option)
            errors[option] = curvature.quadratic(difference)
            distances[option] = difference.square().sum(dtype=torch.float64).item()
        if option in keep:
            packed[option] = format.pack(rounded, option)
    trace = curvature.trace(layer.shape[0])
    row = LayerStatistics(
        name=layer.name,
        shape=layer.shape,
        tokens=curvature.tokens,
        trace=trace,
        errors=errors,
        distances=distances,
    )
    return row, packed


def share_packed(
    block: Block,
    wanted: Collection[str],
    observed: Observed,
    packed: Mapping[str, Mapping[Option, Mapping[str, Tensor]]],
    format: Format,
    options: Collection[Option],
    walk: Walk,
) -> dict[str, dict[Option, dict[str, Tensor]]]:
    """Return what ``measure_layers`` packed on each rank, at some options, on all of them."""
    shared: dict[str, dict[Option, dict[str, Tensor]]] = {}
    for name, owner in observed.owners.items():
        if name in wanted:
            shape = block.layers[name].shape
            shared[name] = {
                option: broadcast_tensors(
                    packed[name][option] if name in packed else None,
                    format.packed_layout(option, shape),
                    owner,
                    walk.fabric,
                )
                for option in options
            }
    return shared


def _gather(rows: list[LayerStatistics], block: Block, world_size: int) -> list[LayerStatistics]:
    """Collect the rows of all ranks, in the order of the block's layers."""
    gathered = [rows]
    if world_size > 1:
        gathered = [[] for _ in range(world_size)]
        dist.all_gather_object(gathered, rows)
    by_name = {entry.name: entry for part in gathered for entry in part}
    return [by_name[name] for name in block.layers if name in by_name]
