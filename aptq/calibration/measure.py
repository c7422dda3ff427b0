"""Pass 1: what every layer is like, on full-precision inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist

from aptq.api import (
    Block,
    Callback,
    Curvature,
    Format,
    HessianEstimator,
    LayerStatistics,
    Option,
    Quantizer,
)
from aptq.calibration.observe import observe
from aptq.calibration.rounding import Preparations
from aptq.calibration.statistics import StatisticsCache
from aptq.calibration.walk import Walk

STAGE = "measure"


def measure(
    walk: Walk,
    estimator: HessianEstimator,
    *,
    layers: Sequence[str],
    rounding: tuple[Quantizer, Format, Sequence[Option]] | None,
    cache: StatisticsCache,
    callbacks: Callback,
) -> dict[str, LayerStatistics]:
    """Return the statistics of ``layers`` by name, in the order of the model.

    ``rounding`` fills ``errors`` at each of its options; None leaves them empty. Blocks whose statistics are cached
    are run but not observed, and when all are, the model is not walked at all.
    """
    num_blocks = walk.source.num_steps
    cached = [cache.load(index) for index in range(num_blocks)]
    if all(rows is not None for rows in cached):
        return {entry.name: entry for rows in cached if rows is not None for entry in rows}
    wanted = set(layers)
    statistics: dict[str, LayerStatistics] = {}
    for step in walk.steps():
        index = step.block.index
        callbacks.on_advance(stage=STAGE, done=index, detail=step.block.name)
        rows = cached[index]
        if rows is None:
            observed = observe(step, estimator, walk, need_outputs=True)
            mine = {name: value for name, value in observed.curvatures.items() if name in wanted}
            rows = _gather(_measure_layers(step.block, mine, rounding), step.block, walk.fabric.world_size)
            if walk.fabric.global_rank == 0:
                cache.save(index, rows)
        else:
            step.run()
        statistics.update((entry.name, entry) for entry in rows)
        callbacks.on_block_end(stage=STAGE, index=index, metrics={})
    return statistics


def _measure_layers(
    block: Block, curvatures: Mapping[str, Curvature], rounding: tuple[Quantizer, Format, Sequence[Option]] | None
) -> list[LayerStatistics]:
    prepared = None if rounding is None else Preparations(rounding[0])
    rows = []
    for name, curvature in curvatures.items():
        layer = block.layers[name]
        errors: dict[Option, float] = {}
        if rounding is not None and prepared is not None:
            quantizer, format, options = rounding
            factors, _ = prepared.of(curvature)
            weight = layer.weight().float()
            for option in options:
                rounded = quantizer.quantize(weight, factors, format, option)
                errors[option] = curvature.quadratic(weight - format.dequantize(rounded.weight, option))
        trace = curvature.trace(layer.shape[0])
        rows.append(LayerStatistics(name=name, shape=layer.shape, tokens=curvature.tokens, trace=trace, errors=errors))
    return rows


def _gather(rows: list[LayerStatistics], block: Block, world_size: int) -> list[LayerStatistics]:
    """Collect the rows of all ranks, in the order of the block's layers."""
    gathered = [rows]
    if world_size > 1:
        gathered = [[] for _ in range(world_size)]
        dist.all_gather_object(gathered, rows)
    by_name = {entry.name: entry for part in gathered for entry in part}
    return [by_name[name] for name in block.layers if name in by_name]
