"""From a step of the walk to the curvatures that this rank owns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from aptq.api import Curvature, HessianEstimator
from aptq.calibration.distribute import assign_owners, reduce_to_owners
from aptq.calibration.walk import Step, Walk

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def observe(
    step: Step, estimator: HessianEstimator, walk: Walk, fabric: Fabric
) -> tuple[dict[str, Curvature], Mapping[str, int]]:
    """Run a block's batches under an estimator; leave its outputs in the step.

    Returns:
        the curvatures of the layers that this rank owns, and every layer's owner.
    """
    with estimator.observe(step.block) as observer:
        step.run(observer)
    sums = observer.sums()
    owners = assign_owners(sums, fabric.world_size)
    return reduce_to_owners(sums, owners, walk.total_tokens, fabric), owners
