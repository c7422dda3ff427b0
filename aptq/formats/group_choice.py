"""Which groups of a layer get more bits and which fewer, so that the mean stays: pure functions on tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Choice:
    """Groups, their widths and what rounding then costs."""

    members: Tensor  # [in]: the group of each input
    widths: Tensor  # [groups]
    cost: float


def least_cost(costs: Tensor, steps: Tensor) -> Tensor:
    """Return the choice ``[groups]`` of least total cost whose steps add up to 0.

    With ``x_g`` the column that group ``g`` takes::

        minimise  sum_g costs[g, x_g]   subject to   sum_g steps[x_g] = 0

    for steps -1, 0, 1: as many groups a bit below as above. Let ``F_g(b)`` be the least cost of the first ``g`` groups
    among choices whose steps add up to ``b``. Any such choice is a choice ``x`` for the last group and one for the
    groups before it with the sum ``b - steps[x]``, and its cost is the sum of theirs, so that (Bellman)::

        F_0(0) = 0,    F_0(b) = inf otherwise,    F_g(b) = min_x costs[g, x] + F_(g-1)(b - steps[x])

    and by induction over ``g``, ``F_G(0)`` is the optimum; going back over the ``x`` that were least gives the choice.
    Nothing is assumed of the costs. Where each bit is worth less than the one before it, the optimum is also what
    sorting gives (the largest gains of a bit more paired with the smallest losses of a bit fewer, while gain exceeds
    loss); measured costs need not be so, and one group may then be first in both lists.

    Args:
        costs: ``[groups, choices]``; infinite where a group has not that choice. Each group must have the step 0.
        steps: ``[choices]``, integer, 0 among them.

    Returns:
        int64 ``[groups]``; where several choices cost the same, nearest to the first of those with the least steps.

    Raises:
        ValueError: no finite choice, which is so only where some group has not the step 0.
    """
    costs, steps = costs.double().cpu(), steps.cpu()
    reach = len(costs) * int(steps.abs().max())
    preferred = steps.abs().argsort(stable=True)  # the first of equals is taken
    least = torch.full((2 * reach + 1,), float("inf"), dtype=torch.float64)
    least[reach] = 0.0
    taken = []
    for cost in costs:
        tried = torch.full((len(steps), 2 * reach + 1), float("inf"), dtype=torch.float64)
        for row, choice in enumerate(preferred.tolist()):
            step = int(steps[choice])
            to, of = (
                slice(max(step, 0), 2 * reach + 1 + min(step, 0)),
                slice(max(-step, 0), 2 * reach + 1 - max(step, 0)),
            )
            tried[row, to] = least[of] + cost[choice]
        least, best = tried.min(0)
        taken.append(best)
    if not bool(least[reach].isfinite()):
        raise ValueError("No choice of finite cost keeps the mean.")
    found, balance = [], reach
    for best in reversed(taken):
        choice = int(preferred[best[balance]])
        found.append(choice)
        balance -= int(steps[choice])
    return torch.tensor(found[::-1], dtype=torch.int64)


def fits(sizes: Mapping[int, Mapping[str, int]], below: int, middle: int, above: int) -> bool:
    """Whether groups at two widths around a third, as many as keep the mean, take no more than they would at that.

    ``sizes`` has, for each width, the size of every tensor by its name. Where this holds for all pairs of widths, it
    does for any choice of widths of that mean: it is made of such pairs.
    """
    names = set(sizes[below]) | set(sizes[above])
    return all(
        (above - middle) * sizes[below].get(name, 0) + (middle - below) * sizes[above].get(name, 0)
        <= (above - below) * sizes[middle].get(name, 0)
        for name in names
    )
