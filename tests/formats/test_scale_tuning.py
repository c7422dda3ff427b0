from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aptq.api import Curvature, Option, RoundableFormat
from aptq.formats.asymmetric_float import AsymmetricFloat
from aptq.formats.float import Float
from aptq.formats.integer import Integer
from aptq.formats.scale_tuning import tuned_scales
from aptq.quantizers.gptq import GPTQ

HEADS, INPUTS, ROWS, WIDTH = 2, 10, 5, 4  # the last group has two inputs
GROUP = (torch.arange(INPUTS) // WIDTH).expand(HEADS, -1)
GROUPS = int(GROUP.max()) + 1


def problem(parts: int) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Return scales, what they scale, T and H, in float64; T lies near a weight of other scales."""
    draw = torch.Generator().manual_seed(parts)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    sides = torch.rand(HEADS, INPUTS, ROWS, generator=draw) < 1 / parts
    levels = normal(HEADS, INPUTS, ROWS).mul(4).round()
    unscaled = [levels] if parts == 1 else [torch.where(side, levels, 0.0) for side in (sides, ~sides)]
    right = [1 + torch.rand(HEADS, GROUPS, ROWS, generator=draw, dtype=torch.float64) for _ in range(parts)]
    root = normal(HEADS, INPUTS, INPUTS)
    target = values(right, unscaled) + normal(HEADS, INPUTS, ROWS) / 20
    return [torch.ones_like(each) for each in right], unscaled, target, root @ root.mT


def values(scales: list[Tensor], parts: list[Tensor]) -> Tensor:
    return torch.stack([scale[:, GROUP[0]] * part for scale, part in zip(scales, parts, strict=True)]).sum(0)


def losses(scales: list[Tensor], parts: list[Tensor], target: Tensor, hessian: Tensor) -> Tensor:
    left = target - values(scales, parts)
    return (left * (hessian @ left)).sum(1)


@pytest.mark.parametrize("parts", [1, 2])
def test_scales_are_those_of_dense_least_squares(parts: int) -> None:
    scales, unscaled, target, hessian = problem(parts)
    found = tuned_scales(scales, unscaled, GROUP, target, hessian, lambda scale: scale)
    member = torch.nn.functional.one_hot(GROUP[0], GROUPS).double()  # [in, groups]
    for head in range(HEADS):
        root = torch.linalg.cholesky(hessian[head]).T
        for row in range(ROWS):
            columns = torch.cat([part[head, :, row, None] * member for part in unscaled], dim=1)
            best = torch.linalg.lstsq(root @ columns, root @ target[head, :, row, None], driver="gelsd").solution[:, 0]
            used = columns.any(0)
            assert (best[used] > 0).all()
            own = torch.cat([each[head, :, row] for each in found])
            torch.testing.assert_close(own[used], best[used], rtol=1e-4, atol=1e-4)


def test_many_rows_are_solved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    scales, unscaled, target, hessian = problem(2)
    whole = tuned_scales(scales, unscaled, GROUP, target, hessian, lambda scale: scale)
    monkeypatch.setattr("aptq.formats.scale_tuning._AT_ONCE", 2 * (2 * GROUPS) ** 2)
    for one, other in zip(
        tuned_scales(scales, unscaled, GROUP, target, hessian, lambda scale: scale), whole, strict=True
    ):
        torch.testing.assert_close(one, other)


def test_rows_that_would_lose_by_rounding_keep_their_scales() -> None:
    scales, unscaled, target, hessian = problem(1)
    coarse = tuned_scales(scales, unscaled, GROUP, target, hessian, lambda scale: (scale / 2).ceil() * 2)
    before, after = (losses(each, unscaled, target, hessian) for each in (scales, coarse))
    assert (after <= before).all()
    kept = (coarse[0] == scales[0]).all(1)
    assert kept.any()
    assert (after[~kept] < before[~kept]).all()


def test_scales_that_nothing_depends_on_and_negative_ones_stay() -> None:
    scales, unscaled, target, hessian = problem(1)
    unscaled[0][0, :WIDTH, 0] = 0  # a group of zeros
    target[1] = -values([torch.ones_like(scales[0])], unscaled)[1]  # the best scales are negative
    (found,) = tuned_scales(scales, unscaled, GROUP, target, hessian, lambda scale: scale)
    torch.testing.assert_close(found[0, 0, 0], scales[0][0, 0, 0])
    assert (found > 0).all()


@pytest.mark.parametrize("format", [Integer, Float, AsymmetricFloat])
@pytest.mark.parametrize("scale_dtype", ["float16", "e4m3"])
def test_a_layer_loses_less_and_is_stored_as_it_was_rounded(
    format: type[Integer] | type[Float] | type[AsymmetricFloat], scale_dtype: str
) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(12, 32, generator=draw), torch.randn(100, 32, generator=draw)
    inputs = inputs @ torch.randn(32, 32, generator=draw)
    quantizer, option = GPTQ(refine=1), Option(3, 8)
    prepared = quantizer.prepare(Curvature(column=(inputs.T @ inputs)[None], tokens=100))
    errors, codes = [], []
    for finetune in (False, True):
        chosen = format(scale_dtype=scale_dtype, finetune=finetune)
        rounded = quantizer.quantize(weight, prepared, chosen, option)
        restored = chosen.dequantize(rounded.weight, option)
        tensors = chosen.pack(rounded.weight, option)
        again = chosen.unpack(tensors, option, (12, 32))
        assert torch.equal(chosen.dequantize(again, option), restored)
        assert isinstance(chosen, RoundableFormat)
        on_grid = chosen.grid(again, option).round(restored.T[None], slice(0, 32))[1]
        torch.testing.assert_close(on_grid[0].T, restored, rtol=1e-6, atol=1e-6)
        codes.append(rounded.weight.codes)
        errors.append(((weight - restored) @ inputs.T).norm().item())
    assert torch.equal(*codes)
    assert errors[1] < errors[0]
