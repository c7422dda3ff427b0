"""The Hessian of the loss, given its gradients."""

from dataclasses import replace

import pytest
import torch

from aptq.api import AptqError, Block, BlockInputs
from aptq.hessians.loss import Loss
from aptq.testing import check_hessian
from aptq.testing.models import tiny_block, tiny_inputs


def _guided(groups: int) -> tuple[Loss, BlockInputs, Block]:
    estimator, block, inputs = Loss(groups=groups), tiny_block(), tiny_inputs()
    generator = torch.Generator().manual_seed(0)
    guidance = {
        name: torch.rand(*inputs.hidden.shape[:2], number, generator=generator)
        for name, number in estimator.guides(block).items()
    }
    return estimator, inputs, replace(block, guidance=guidance)


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_keeps_the_contract(groups: int) -> None:
    estimator, inputs, block = _guided(groups)
    check_hessian(estimator, block=block, inputs=inputs)


def test_is_the_gram_matrix_of_weighted_inputs() -> None:
    estimator, inputs, block = _guided(2)
    x: dict[str, torch.Tensor] = {}
    for name, layer in block.layers.items():
        layer.module.register_forward_pre_hook(lambda _, args, name=name: x.update({name: args[0]}))
    with torch.no_grad(), estimator.observe(block) as observer:
        observer(inputs)
    for name, total in observer.sums().items():
        weights = block.guidance[name]
        expected = torch.einsum("btg,bti,btj->gij", weights, x[name], x[name])
        assert torch.allclose(total.column, expected, rtol=1e-4, atol=1e-4)
        assert total.tokens == inputs.hidden.shape[0] * inputs.hidden.shape[1]


def test_groups_divide_the_channels() -> None:
    block = tiny_block()
    found = Loss(groups=6).guides(block)
    assert all(layer.shape[0] % found[name] == 0 for name, layer in block.layers.items())


def test_gradients_have_to_be_taken_first() -> None:
    with pytest.raises(AptqError, match="have to be taken"), Loss().observe(tiny_block()):
        pass


@pytest.mark.parametrize("options", [{"groups": 0}, {"labels": "text"}])
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(AptqError, match=f"hessian.{next(iter(options))}"):
        Loss(**options)  # type: ignore[arg-type]
