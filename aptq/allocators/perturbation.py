"""Other sensitivities than those predicted, drawn at random: where plans that differ from the best one come from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aptq.api import Allocation
from aptq.names import place


def perturbation(problem: Allocation, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a change of each unit's log sensitivity, ``[units]``: of its kind, along the depth, and of its own.

    Each of the three influences has a standard deviation of 1 at most (that of the depth, at its two ends). Errors of a
    metric are of that sort: it has too little regard for a kind of layer, or for how far errors have still to go.
    """
    depths, kinds = zip(*(place(unit[0]) for unit in problem.units()), strict=True)
    last = max((depth for depth in depths if depth is not None), default=0) or 1
    of_kind = {kind: rng.normal() for kind in dict.fromkeys(kinds)}
    tilt = rng.normal()
    shared = [of_kind[kind] + tilt * (2 * (depth or 0) / last - 1) for kind, depth in zip(kinds, depths, strict=True)]
    return np.array(shared) + rng.normal(size=len(shared))
