"""The choice of groups against brute force."""

from itertools import product

import pytest
import torch
from torch import Tensor

from aptq.formats.group_choice import least_cost


def _by_brute_force(costs: Tensor, steps: Tensor) -> float:
    groups = len(costs)
    balanced = (c for c in product(range(len(steps)), repeat=groups) if int(steps[list(c)].sum()) == 0)
    return min(float(costs[torch.arange(groups), list(choice)].sum()) for choice in balanced)


@pytest.mark.parametrize("steps", [(-1, 0, 1), (0, 1), (-2, -1, 0, 1, 2), (-1, 0, 1, 2), (0, 2, -1)])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_optimum_whatever_the_costs(steps: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randn(6, len(steps), generator=generator, dtype=torch.float64)  # neither convex nor falling
    costs[seed % 6, [each for each, step in enumerate(steps) if step]] = float("inf")  # one that has to stay
    choice = least_cost(costs, torch.tensor(steps))
    assert int(torch.tensor(steps)[choice].sum()) == 0
    assert float(costs[torch.arange(6), choice].sum()) == pytest.approx(_by_brute_force(costs, torch.tensor(steps)))


@pytest.mark.parametrize("groups", [1, 2, 7, 40])
def test_convex_costs_are_paired_by_sorted_gains(groups: int) -> None:
    """A bit more is worth less than the bit before it: the largest gains go with the smallest losses."""
    generator = torch.Generator().manual_seed(groups)
    at = 10 ** torch.randn(groups, generator=generator, dtype=torch.float64)
    costs = at[:, None] * torch.tensor([4.1, 1.0, 0.27], dtype=torch.float64)
    choice = least_cost(costs, torch.tensor([-1, 0, 1]))
    gains, losses = (costs[:, 1] - costs[:, 2]).sort(descending=True).values, (costs[:, 0] - costs[:, 1]).sort().values
    saved = (gains - losses)[gains > losses].sum()
    assert float(costs[torch.arange(groups), choice].sum()) == pytest.approx(float(at.sum() - saved))
    assert int((choice == 2).sum()) == int((choice == 0).sum()) == int((gains > losses).sum())


def test_nothing_moves_without_a_gain() -> None:
    assert least_cost(torch.ones(5, 3), torch.tensor([-1, 0, 1])).tolist() == [1] * 5
    assert least_cost(torch.zeros(0, 3), torch.tensor([-1, 0, 1])).tolist() == []
    with pytest.raises(ValueError, match="keeps the mean"):
        least_cost(torch.tensor([[0.0, float("inf")]]), torch.tensor([1, 0]))
