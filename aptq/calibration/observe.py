"""From a step of the walk to the curvatures that this rank owns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from aptq.api import (
    AptqError,
    Curvature,
    CurvatureSum,
    DriftEstimator,
    HessianEstimator,
    SequentialEstimator,
    Transform,
)
from aptq.calibration.coding import turned
from aptq.calibration.distribute import assign_owners, reduce_to_owners
from aptq.calibration.lockstep import lockstep
from aptq.calibration.walk import Step, Walk
from aptq.models.memory import trim

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True, eq=False)
class Observed:
    """Layers whose curvature is known: every layer's owner rank, and the curvatures that this rank owns.

    Curvatures are in the basis that the layers are stored in (see ``turned``).
    """

    owners: Mapping[str, int]
    curvatures: Mapping[str, Curvature]


def observe(
    step: Step, estimator: HessianEstimator, walk: Walk, transform: Transform | None, *, need_outputs: bool
) -> Observed:
    """Run a block's batches under an estimator; leave its outputs in the step, when they are needed."""
    with estimator.observe(step.block, need_outputs=need_outputs) as observer:
        step.observe(observer, keep_outputs=need_outputs)
    sums = observer.sums()
    owners = assign_owners(sums, walk.fabric.world_size)
    found = reduce_to_owners(sums, owners, walk.total_tokens, walk.fabric)
    changed: dict[int, Curvature] = {}
    for curvature in found.values():
        if id(curvature) not in changed:  # layers that share one go on sharing it
            changed[id(curvature)] = turned(curvature, transform)
    return Observed(owners, {name: changed[id(curvature)] for name, curvature in found.items()})


def observe_in_turn(
    step: Step, estimator: SequentialEstimator, walk: Walk, transform: Transform | None, layers: Collection[str]
) -> Iterator[Observed]:
    """Yield one layer after the other, as the block calls them; round each before asking for the next.

    In the end the step's outputs are those of the rounded block. Layers that are fed the same tensors share their
    curvature, as in ``observe``; those that the block does not call come last.

    With full-precision activations beside (``Step.full_precision``), these are at the same layer when its curvature and
    drift are taken, and through it before it is rounded: no copy of the block's weights is needed.
    """
    fabric, missing = walk.fabric, dict.fromkeys(layers)
    total: CurvatureSum | None = None
    curvature: Curvature | None = None
    owner = -1
    with _watched(step, estimator, layers) as sums, lockstep(step, layers) as batches:
        while (name := _agreed(batches.advance(), step, fabric)) is not None:
            del missing[name]
            before, total = total, sums(name, batches.inputs())
            if not fabric.broadcast(total is before):
                owner = (owner + 1) % fabric.world_size
                curvature = _reduced(name, total, owner, walk, transform)
            yield _one(name, owner, curvature)
            trim()
        for name in missing:
            yield _one(name, 0, _reduced(name, sums(name, []), 0, walk, transform))


def observe_head(step: Step, estimator: DriftEstimator, walk: Walk, transform: Transform | None) -> Iterator[Observed]:
    """Yield the head with its drift: it is called with what the step is fed, so nothing has to be run."""
    originals = [] if step.full_precision is None else [batch.hidden for batch in step.full_precision.inputs]
    inputs, samples = [batch.hidden for batch in step.inputs], [batch.samples for batch in step.inputs]
    with estimator.watch(step.block) as observer:
        for name, layer in step.block.layers.items():
            total = observer.curvature_sum(layer, inputs, samples, originals)
            yield _one(name, 0, _reduced(name, total, 0, walk, transform))


@contextmanager
def _watched(
    step: Step, estimator: SequentialEstimator, layers: Collection[str]
) -> Iterator[Callable[[str, Sequence[Tensor]], CurvatureSum]]:
    """Give the function from a layer and its inputs, which may be none, to its sums, with drift where it is asked for.

    The full-precision batches have gone on to the next layer when it returns.
    """
    samples = [batch.samples for batch in step.inputs]
    if step.full_precision is None:
        with estimator.watch(step.block) as plain:
            yield lambda name, inputs: plain.curvature_sum(step.block.layers[name], inputs, samples if inputs else [])
        return
    if not isinstance(estimator, DriftEstimator):
        raise RuntimeError(f"{type(estimator).__name__} cannot tell drift; this is to be refused before any work")
    with estimator.watch(step.block) as observer, lockstep(step.full_precision, layers) as originals:
        place = originals.advance()

        def sums(name: str, inputs: Sequence[Tensor]) -> CurvatureSum:
            nonlocal place
            layer = step.block.layers[name]
            if not inputs:
                return observer.curvature_sum(layer, [], [], [])
            if place != name:
                raise AptqError(
                    f"{step.block.name} comes to {name} on the quantized model's activations and to {place} on the "
                    "full-precision model's, so they cannot be compared. Use a quantizer that needs no drift."
                )
            total = observer.curvature_sum(layer, inputs, samples, originals.inputs())
            if total.drift is None:
                raise AptqError(f"{type(estimator).__name__} says that it gives drift and gave none for {name}.")
            place = originals.advance()
            return total

        yield sums


def _one(name: str, owner: int, curvature: Curvature | None) -> Observed:
    return Observed({name: owner}, {} if curvature is None else {name: curvature})


def _reduced(name: str, total: CurvatureSum, owner: int, walk: Walk, transform: Transform | None) -> Curvature | None:
    """Return the curvature on its owner rank, None on the others."""
    found = reduce_to_owners({name: total}, {name: owner}, walk.total_tokens, walk.fabric).get(name)
    return None if found is None else turned(found, transform)


def _agreed(name: str | None, step: Step, fabric: Fabric) -> str | None:
    """Return the layer that the first rank came to: a rank without samples has none of its own."""
    first = fabric.broadcast(name)
    if step.inputs and name != first:
        raise AptqError(
            f"{step.block.name} comes to {name} on rank {fabric.global_rank} and to {first} on rank 0. "
            "Use true_sequential=false, which runs each block twice instead."
        )
    return first
