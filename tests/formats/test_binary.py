"""Binarized weights, with a second scale where it pays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aptq.api import AptqError, Curvature, Format, Option, RefitGrid
from aptq.backends.select import choose_backend
from aptq.calibration.quantize import storage_bits
from aptq.formats.binary import Binary, BinaryGrid
from aptq.formats.float import Float
from aptq.formats.group_bits import GroupBits
from aptq.formats.integer import Integer
from aptq.formats.outliers import Outliers
from aptq.formats.scaled import Scaled, weighted_error
from aptq.quantizers.gptq import GPTQ
from aptq.quantizers.nearest import Nearest
from aptq.quantizers.two_sided import TwoSided
from aptq.registry import build
from aptq.testing import check_backend, check_format, check_quantizer
from tests.backends.specs import spec_of

PUBLISHED = Binary(group_size=128, salient=0.1, salient_scales="two_pass", centre=True)


@pytest.mark.parametrize(
    ("format", "bits"),
    [
        (Binary(salient=0.2), (1, 2)),
        (PUBLISHED, (1, 2)),
        (Binary(salient=0.0), (1,)),
        (Binary(salient=1.0, scale_dtype="bfloat16"), (2,)),
    ],
)
def test_keeps_the_contract(format: Binary, bits: tuple[int, ...]) -> None:
    check_format(format, bits=bits, group_sizes=(16,))


@pytest.mark.parametrize(
    "format",
    [
        Outliers(inner=Binary(salient=0.2), share=0.02),
        Scaled(inner=Binary(salient=0.2), steps=1),
        GroupBits(inner=Binary(salient=0.0), one_bit=Float()),
    ],
)
def test_other_formats_go_around_it(format: Format) -> None:
    check_format(format, bits=(2,), group_sizes=(32,), shapes=((6, 100),))


@pytest.mark.parametrize("quantizer", [Nearest(), GPTQ(), GPTQ(act_order=False, refine=1), TwoSided()])
def test_works_under_every_kind_of_quantizer(quantizer: GPTQ) -> None:
    check_quantizer(quantizer, format=Binary(salient=0.2), bits=(2,))


def _problem(heads: int = 1) -> tuple[Tensor, Tensor]:
    """Return a weight ``[heads, 24, 256]`` and importances, the inputs 30, 31 and 200 being the salient ones."""
    generator = torch.Generator().manual_seed(5)
    weight, importance = torch.randn(heads, 24, 256, generator=generator), torch.ones(heads, 256)
    weight[..., [30, 200]] *= 5
    importance[:, 31] = 40
    return weight, importance


def _quantized(format: Format, quantizer: GPTQ | Nearest, option: Option) -> float:
    """Return the error of outputs."""
    weight, importance = _problem()
    inputs = torch.randn(1, 600, 256, generator=torch.Generator().manual_seed(7)) * importance[:, None].sqrt()
    inputs += 0.3 * inputs.roll(1, 2)
    curvature = Curvature(column=inputs.transpose(1, 2) @ inputs / 600, tokens=600)
    rounded = quantizer.quantize(weight[0], quantizer.prepare(curvature), format, option)
    return float(curvature.quadratic(format.dequantize(rounded.weight, option) - weight[0]))


@pytest.mark.parametrize("heads", [1, 2])
def test_inputs_of_the_largest_salience_have_scales_of_their_own(heads: int) -> None:
    weight, importance = _problem(heads)
    grid = Binary(salient=3 / 256).fit(weight, Option(1, 64), importance)
    assert grid.salient.tolist() == [30, 31, 200]
    magnitudes = grid.round(weight.transpose(1, 2), slice(None))[1].abs()
    others = magnitudes[:, [at for at in range(64) if at not in (30, 31)]]
    assert torch.equal(others, others[:, :1].expand_as(others)), "one for each output in a group"
    assert not torch.equal(magnitudes[:, 30], magnitudes[:, 31])


def test_a_weight_has_the_nearest_of_its_four_values() -> None:
    weight, importance = _problem()
    grid = Binary(centre=True).fit(weight, Option(2, 64), importance)
    drifted = weight.transpose(1, 2) + 0.2  # as error feedback leaves them
    _, rounded = grid.round(drifted, slice(None))
    mean, low, high = (table[:, grid.group[0]] for table in grid.parameters)
    allowed = torch.stack([mean - high, mean - low, mean + low, mean + high], dim=-1)
    distance = (allowed - drifted[..., None]).abs().amin(-1)
    assert torch.allclose((rounded - drifted).abs(), distance, atol=1e-6)


@pytest.mark.parametrize("quantizer", [Nearest(), GPTQ(), GPTQ(act_order=False)])
def test_the_claim_of_the_paper_in_miniature(quantizer: GPTQ | Nearest) -> None:
    """Binarizing salient inputs twice saves some of what one sign loses, and splitting the others much."""
    plain, salient = Binary(salient=0.0), Binary(salient=0.05, salient_scales="two_pass")
    tried = ((plain, 1), (salient, 1), (salient, 2))
    errors = [_quantized(format, quantizer, Option(bits, 128)) for format, bits in tried]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.6 * errors[1]


@pytest.mark.parametrize("bits", [1, 2])
def test_the_best_break_point_loses_less_than_two_passes(bits: int) -> None:
    weight, importance = _problem()
    formats = (Binary(salient=0.1), Binary(salient=0.1, salient_scales="two_pass"))
    errors = [weighted_error(each.fit(weight, Option(bits, -1), importance), weight, importance) for each in formats]
    assert errors[0] < errors[1]


def test_two_bits_lose_less_than_integers_of_more_storage() -> None:
    option, shape = Option(2, -1), (256, 256)
    assert storage_bits(Binary(), option, shape) < storage_bits(Integer(), Option(2, 64), shape)
    assert _quantized(Binary(), GPTQ(), option) < 0.9 * _quantized(Integer(), GPTQ(), Option(2, 64))


def test_scales_fitted_anew_to_what_feedback_made_of_columns_lose_less() -> None:
    errors = [_quantized(Binary(refits=refits), GPTQ(), Option(1, -1)) for refits in (0, 1)]
    assert errors[1] < errors[0]


def test_a_refit_takes_columns_in_any_order_and_ends() -> None:
    weight, importance = _problem(heads=2)
    grid = Binary().fit(weight, Option(2, 64), importance)
    assert isinstance(grid, RefitGrid)
    met = weight.transpose(1, 2) * 1.5
    order = torch.stack([torch.randperm(256, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    natural, permuted = grid.refit(met), grid.permuted(order).refit(met.gather(1, order[..., None].expand_as(met)))
    assert isinstance(natural, BinaryGrid)
    assert isinstance(permuted, BinaryGrid)
    assert all(torch.equal(*both) for both in zip(natural.parameters, permuted.parameters, strict=True))
    assert torch.equal(permuted.order, order)
    assert natural.refit(met) is None


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 80)),
    bits=st.sampled_from([1, 2]),
    salient=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    group_size=st.sampled_from([-1, 8, 24]),
    seed=st.integers(0, 1000),
)
def test_what_is_packed_comes_back(
    shape: tuple[int, int], bits: int, salient: float, group_size: int, seed: int
) -> None:
    format, option = Binary(salient=salient, centre=seed % 2 == 0), Option(bits, group_size)
    weight = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
    grid = format.fit(weight, option)
    stored = grid.finish(grid.round(weight.transpose(1, 2) * 2, slice(None))[0])
    packed = format.pack(stored, option)
    back = format.unpack(packed, option, shape)
    assert torch.equal(back.codes, stored.codes)
    assert torch.equal(format.dequantize(back, option), format.dequantize(stored, option))
    layout = {name: (tuple(each.shape), each.dtype) for name, each in packed.items()}
    assert layout == format.packed_layout(option, shape)


def test_all_that_is_stored_is_counted() -> None:
    shape, count = (64, 640), 64
    format = Binary(group_size=128, salient=0.1)
    of_salient = 2 * 16 * 64 + 16 * count  # two scales an output, and which inputs
    one = 64 * 640 + 64 * count + 5 * 16 * 64 + of_salient  # signs, second bits, a scale a group
    assert storage_bits(format, Option(1, 128), shape) == one
    two = 2 * 64 * 640 + 5 * 2 * 16 * 64 + of_salient
    assert storage_bits(format, Option(2, 128), shape) == two
    centred = Binary(group_size=128, salient=0.1, centre=True)
    assert storage_bits(centred, Option(2, 128), shape) == two + 6 * 16 * 64
    assert Binary().packed_layout(Option(1, -1), (2, 40000))["salient"][1] == torch.int32


def test_what_reads_packed_codes_refuses_it_and_the_reference_takes_it() -> None:
    choice = choose_backend(spec_of(Binary(), Option(2, 32), (64, 64)))
    assert choice.name == "reference"
    check_backend(choice.backend, format=Binary(), bits=(1, 2))


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(AptqError, match="1 or 2 bits; got bits=3"):
        Binary().check(Option(3, -1), (8, 64))
    with pytest.raises(AptqError, match="from 0 to 1"):
        Binary(salient=1.5)
    with pytest.raises(AptqError, match="use one of split, two_pass"):
        Binary(salient_scales="greedy")
    with pytest.raises(AptqError, match="refits=-1"):
        Binary(refits=-1)
    with pytest.raises(AptqError, match="group_size=0"):
        Binary(group_size=0)
    with pytest.raises(AptqError, match="scale_dtype"):
        Binary(scale_dtype="e4m3")
    with pytest.raises(AptqError, match="not finite"):
        Binary().fit(torch.full((1, 2, 8), 1e6), Option(2, -1))
    assert build("format", {"name": "binary"}) == Binary()
