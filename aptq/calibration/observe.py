"""From a step of the walk to the curvatures that this rank owns."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from aptq.api import AptqError, Curvature, HessianEstimator, InputEstimator, Layer
from aptq.calibration.distribute import assign_owners, reduce_to_owners
from aptq.calibration.lockstep import lockstep
from aptq.calibration.walk import Step, Walk

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True, eq=False)
class Observed:
    """Layers whose curvature is known: every layer's owner rank, and the curvatures that this rank owns."""

    owners: Mapping[str, int]
    curvatures: Mapping[str, Curvature]


def observe(step: Step, estimator: HessianEstimator, walk: Walk, *, need_outputs: bool) -> Observed:
    """Run a block's batches under an estimator; leave its outputs in the step, when they are needed."""
    with estimator.observe(step.block, need_outputs=need_outputs) as observer:
        step.observe(observer, keep_outputs=need_outputs)
    sums = observer.sums()
    owners = assign_owners(sums, walk.fabric.world_size)
    return Observed(owners, reduce_to_owners(sums, owners, walk.total_tokens, walk.fabric))


def observe_in_turn(step: Step, estimator: InputEstimator, walk: Walk, layers: Collection[str]) -> Iterator[Observed]:
    """Yield one layer after the other, as the block calls them; round each before asking for the next.

    In the end the step's outputs are those of the rounded block. Layers that are fed the same tensors share their
    curvature, as in ``observe``; those that the block does not call come last.
    """
    fabric = walk.fabric
    missing = dict.fromkeys(layers)
    seen: list[Tensor] = []
    owner = -1
    curvature: Curvature | None = None
    with lockstep(step, layers) as batches:
        while (name := _agreed(batches.advance(), step, fabric)) is not None:
            del missing[name]
            inputs = batches.inputs()
            if not fabric.broadcast(len(seen) > 0 and all(new is old for new, old in zip(inputs, seen, strict=True))):
                owner = (owner + 1) % fabric.world_size
                curvature = _curvature(step.block.layers[name], inputs, estimator, owner, walk)
            seen = inputs
            yield _one(name, owner, curvature)
    for name in missing:
        yield _one(name, 0, _curvature(step.block.layers[name], [], estimator, 0, walk))


def _one(name: str, owner: int, curvature: Curvature | None) -> Observed:
    return Observed({name: owner}, {} if curvature is None else {name: curvature})


def _curvature(
    layer: Layer, inputs: Sequence[Tensor], estimator: InputEstimator, owner: int, walk: Walk
) -> Curvature | None:
    """Return the curvature on its owner rank, None on the others."""
    total = estimator.curvature_sum(layer, inputs)
    return reduce_to_owners({layer.name: total}, {layer.name: owner}, walk.total_tokens, walk.fabric).get(layer.name)


def _agreed(name: str | None, step: Step, fabric: Fabric) -> str | None:
    """Return the layer that the first rank came to: a rank without samples has none of its own."""
    first = fabric.broadcast(name)
    if step.inputs and name != first:
        raise AptqError(
            f"{step.block.name} comes to {name} on rank {fabric.global_rank} and to {first} on rank 0. "
            "Use true_sequential=false, which runs each block twice instead."
        )
    return first
