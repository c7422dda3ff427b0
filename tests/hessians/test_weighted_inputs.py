"""Gram matrices of weighted tokens; ``test_loss.py`` has them for whole blocks."""

import pytest
import torch

from aptq.hessians.weighted_inputs import WeightedInputs, WeightedLayers
from aptq.testing.models import tiny_block


def test_tokens_count_by_their_weights_in_each_group() -> None:
    name, layer = next(iter(tiny_block().layers.items()))
    x, weights = torch.randn(3, 4, layer.shape[1]), torch.rand(5, 4, 2)
    total = WeightedLayers({name: weights}).curvature_sum(layer, [x[:1], x[1:]], [[4], [0, 2]])
    mine = weights[[4, 0, 2]]
    assert torch.allclose(total.column, torch.einsum("btg,bti,btj->gij", mine, x, x), rtol=1e-4, atol=1e-5)
    assert torch.equal(total.column, total.column.mT)
    assert total.tokens == 12


def test_samples_and_tokens_may_be_one_dimension() -> None:
    name, layer = next(iter(tiny_block().layers.items()))
    x, weights = torch.randn(3, 4, layer.shape[1]), torch.rand(3, 4, 1)
    sums = []
    for shape in (x.shape, (12, layer.shape[1])):
        weighted = WeightedInputs({name: layer}, {name: weights})
        weighted.add(name, x.reshape(shape), [0, 1, 2])
        sums.append(weighted.pop(name))
    assert torch.equal(sums[0].column, sums[1].column)
    with pytest.raises(KeyError):
        weighted.pop(name)
