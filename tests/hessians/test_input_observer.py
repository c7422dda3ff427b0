"""Gram matrices of the inputs of a block's layers, collected while it runs."""

import pytest
import torch
from torch import nn

from aptq.api import Block, BlockInputs
from aptq.hessians.input import Input
from aptq.hessians.input_observer import InputLayers
from aptq.models.structure import find_layers
from aptq.testing.models import tiny_block


class _Block(nn.Module):
    """Query, key and value from one tensor; an output layer; one layer that is never called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, width)
        self.unused = nn.Linear(width, 7)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.o(torch.tanh(self.q(hidden)) * self.k(hidden) + self.v(hidden))


def _observed(width: int = 20) -> tuple[dict, torch.Tensor]:  # type: ignore[type-arg]
    torch.manual_seed(0)
    module = _Block(width)
    block = Block(index=0, name="b", module=module, layers=find_layers(module, "b"))
    batches = [torch.randn(2, 9, width), torch.randn(1, 9, width)]
    with torch.no_grad(), Input().observe(block) as observer:
        for batch in batches:
            observer(BlockInputs(hidden=batch, args=(), kwargs={}))
    return dict(observer.sums()), torch.cat([batch.reshape(-1, width) for batch in batches])


def test_is_twice_the_gram_matrix_of_the_inputs() -> None:
    sums, x = _observed()
    expected = 2 * x.double().T @ x.double()
    assert torch.allclose(sums["b.q"].column[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(sums["b.q"].column, sums["b.q"].column.transpose(1, 2))
    assert sums["b.q"].tokens == 27


def test_stopping_at_the_last_layer_sees_the_same() -> None:
    sums: list[dict] = []  # type: ignore[type-arg]
    for need_outputs in (True, False):
        torch.manual_seed(0)
        block, outputs = tiny_block(), []
        with torch.no_grad(), Input().observe(block, need_outputs=need_outputs) as observer:
            for seed in range(3):
                torch.manual_seed(seed)
                outputs.append(observer(BlockInputs(hidden=torch.randn(2, 9, 24), args=(), kwargs={})))
        sums.append(dict(observer.sums()))
        assert [output is None for output in outputs] == [False, not need_outputs, not need_outputs]
    assert all(torch.equal(sums[0][name].column, sums[1][name].column) for name in sums[0])


def test_strips_cover_wide_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aptq.hessians.gram._STRIP", 6)
    sums, x = _observed(20)
    assert torch.allclose(sums["b.v"].column[0], 2 * x.T @ x, rtol=1e-5, atol=1e-4)


def test_layers_with_one_input_share_one_sum() -> None:
    sums, _ = _observed()
    assert sums["b.q"] is sums["b.k"] is sums["b.v"]
    assert sums["b.o"] is not sums["b.q"]


def test_a_layer_that_is_never_called_has_zeros() -> None:
    sums, _ = _observed()
    assert sums["b.unused"].tokens == 0
    assert not sums["b.unused"].column.any()


def test_drift_is_shared_where_both_models_share_their_inputs() -> None:
    layer, (x, full) = tiny_block().layers["model.layers.0.gate_proj"], torch.randn(2, 3, 5, 24)
    layers = InputLayers()
    first = layers.curvature_sum(layer, [x], [[0, 1, 2]], [full])
    assert layers.curvature_sum(layer, [x], [[0, 1, 2]], [full]) is first
    assert layers.curvature_sum(layer, [x], [[0, 1, 2]], [full.clone()]) is not first
    assert layers.curvature_sum(layer, [x], [[0, 1, 2]]).drift is None
    assert first.drift is not None
    assert first.drift.shape == first.column.shape


def test_a_layer_without_inputs_has_no_drift() -> None:
    total = InputLayers().curvature_sum(tiny_block().layers["model.layers.0.gate_proj"], [], [], [])
    assert total.drift is not None
    assert not total.drift.any()
