"""From a step of the walk to the curvatures that this rank owns."""

from __future__ import annotations

from collections.abc import Mapping

from aptq.api import Curvature, HessianEstimator
from aptq.calibration.distribute import assign_owners, reduce_to_owners
from aptq.calibration.walk import Step, Walk


def observe(
    step: Step, estimator: HessianEstimator, walk: Walk, *, need_outputs: bool
) -> tuple[dict[str, Curvature], Mapping[str, int]]:
    """Run a block's batches under an estimator; leave its outputs in the step, when they are needed.

    Returns:
        the curvatures of the layers that this rank owns, and every layer's owner.
    """
    with estimator.observe(step.block, need_outputs=need_outputs) as observer:
        step.observe(observer)
    sums = observer.sums()
    owners = assign_owners(sums, walk.fabric.world_size)
    return reduce_to_owners(sums, owners, walk.total_tokens, walk.fabric), owners
