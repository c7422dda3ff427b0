"""Groups of several widths in one layer."""

import pytest
import torch
from torch import Tensor

from aptq.api import AptqError, Curvature, Format, Option
from aptq.backends.select import choose_backend
from aptq.calibration.quantize import storage_bits
from aptq.formats.asymmetric_float import AsymmetricFloat
from aptq.formats.float import Float
from aptq.formats.group_bits import GroupBits
from aptq.formats.group_grid import columns_of
from aptq.formats.integer import Integer
from aptq.formats.mixed import Mixed
from aptq.formats.outliers import Outliers
from aptq.formats.scaled import Scaled, weighted_error
from aptq.formats.vector import Vector
from aptq.quantizers.gptq import GPTQ
from aptq.quantizers.nearest import Nearest
from aptq.quantizers.two_sided import TwoSided
from aptq.registry import build
from aptq.testing import check_backend, check_format, check_quantizer
from tests.backends.specs import spec_of

OPTION = Option(3, 32)
SHAPES = ((8, 160), (6, 100), (5, 33), (3, 7))
"""Five groups of 32; three and a shorter one; one and a shorter one; a part of one."""


def _format(inner: Format | None = None, **options: object) -> GroupBits:
    return GroupBits(inner=inner or Integer(clip_steps=2), one_bit=Float(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("format", "bits"),
    [
        (_format(), (2, 8)),
        (_format(Integer(symmetric=True, clip_steps=0), spread=2, grouping="salience"), (3,)),
        (_format(AsymmetricFloat(clip_steps=0)), (2,)),
        (_format(Scaled(inner=Integer(clip_steps=0), steps=1)), (3,)),
    ],
)
def test_keeps_the_contract(format: GroupBits, bits: tuple[int, ...]) -> None:
    check_format(format, bits=bits, group_sizes=(32,), shapes=SHAPES)


@pytest.mark.parametrize("format", [Scaled(inner=_format(), steps=1), Outliers(inner=_format(), share=0.02)])
def test_other_formats_go_around_it(format: Format) -> None:
    check_format(format, bits=(3,), group_sizes=(32,), shapes=SHAPES)


@pytest.mark.parametrize("quantizer", [Nearest(), GPTQ(), GPTQ(act_order=False, refine=1), TwoSided()])
def test_works_under_every_kind_of_quantizer(quantizer: GPTQ) -> None:
    check_quantizer(quantizer, format=_format(grouping="salience"), bits=(3,))


def _problem(heads: int = 1) -> tuple[Tensor, Tensor]:
    """Return a weight ``[heads, 24, 256]`` in eight groups of 32, and importances that differ by groups."""
    generator = torch.Generator().manual_seed(5)
    by_group = torch.tensor([1.0, 30.0, 2.0, 0.05, 1.0, 0.02, 100.0, 1.0]).repeat_interleave(32)
    return torch.randn(heads, 24, 256, generator=generator), by_group.expand(heads, -1)


@pytest.mark.parametrize("inner", [Integer(), Integer(symmetric=True), AsymmetricFloat()])
@pytest.mark.parametrize("bits", [2, 3])
def test_bits_go_where_errors_cost_most(inner: Integer | AsymmetricFloat, bits: int) -> None:
    weight, importance = _problem()
    option = Option(bits, 32)
    plain = weighted_error(inner.fit(weight, option, importance), weight, importance)
    grid = _format(inner).fit(weight, option, importance)
    widths = grid.stored["group_widths"].tolist()
    assert sum(widths) == 8 * bits
    assert widths[1] == widths[6] == bits + 1
    assert widths[3] == widths[5] == bits - 1
    assert weighted_error(grid, weight, importance) < 0.5 * plain


def test_a_wider_spread_and_groups_of_like_salience_cost_less() -> None:
    weight, importance = _problem()
    importance = importance[:, torch.randperm(256, generator=torch.Generator().manual_seed(1))]
    formats = (_format(spread=0), _format(), _format(grouping="salience"), _format(grouping="salience", spread=2))
    errors = [weighted_error(each.fit(weight, OPTION, importance), weight, importance) for each in formats]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.6 * errors[1]
    assert errors[3] < 0.9 * errors[2]
    plain = Integer(clip_steps=2).fit(weight, OPTION, importance)
    assert errors[0] == pytest.approx(weighted_error(plain, weight, importance), rel=1e-6)


def test_neighbours_stay_together_where_like_salience_is_worth_less() -> None:
    weight, importance = _problem()
    weight = weight * importance.rsqrt()[:, None]  # inputs of a group are alike in size, not in what they count
    grids = [_format(grouping=each).fit(weight, OPTION, importance) for each in ("neighbours", "salience")]
    assert torch.equal(grids[1].stored["group_members"], (torch.arange(256) // 32).to(torch.uint8))
    assert torch.equal(grids[0].stored["group_widths"], grids[1].stored["group_widths"])


def test_heads_share_their_widths() -> None:
    weight, importance = _problem(heads=2)
    one = weight.reshape(1, 48, 256)
    widths = _format().fit(weight, OPTION, importance).stored["group_widths"]
    assert torch.equal(widths, _format().fit(one, OPTION, importance[:1]).stored["group_widths"])


def test_a_shorter_last_group_keeps_its_bits() -> None:
    weight, importance = _problem()
    importance = importance.clone()
    importance[:, 192:] = 1e6
    grid = _format().fit(weight[..., :200], OPTION, importance[:, :200])
    assert grid.stored["group_widths"].tolist()[-1] == 3
    assert sum(grid.stored["group_widths"].tolist()) == 3 * 7


@pytest.mark.parametrize("quantizer", [Nearest(), GPTQ(), GPTQ(act_order=False), TwoSided()])
def test_errors_of_outputs_fall_as_well(quantizer: GPTQ) -> None:
    weight, importance = _problem()
    inputs = torch.randn(1, 400, 256, generator=torch.Generator().manual_seed(7)) + 0.3
    inputs = inputs * importance[:, None].sqrt()
    curvature = Curvature(column=inputs.transpose(1, 2) @ inputs / 400, tokens=400)
    factors = quantizer.prepare(curvature)
    formats = (Integer(), _format(Integer()), _format(Integer(), grouping="salience"))
    errors = []
    for format in formats:
        dense = format.dequantize(quantizer.quantize(weight[0], factors, format, OPTION).weight, OPTION)
        errors.append(curvature.quadratic(dense - weight[0]))
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[0]


def test_columns_are_stored_by_width_and_group() -> None:
    members = torch.tensor([1, 0, 1, 2, 0, 2])
    found = columns_of(torch.tensor([3, 2, 3]), members)
    assert [(bits, columns.tolist()) for bits, columns in found] == [(2, [0, 2]), (3, [1, 4, 3, 5])]


@pytest.mark.parametrize(("grouping", "more"), [("neighbours", 8 * 4), ("salience", 8 * 4 + 8 * 128)])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_all_that_is_stored_is_counted(grouping: str, more: int, bits: int) -> None:
    option, shape = Option(bits, 32), (64, 128)
    assert storage_bits(_format(grouping=grouping), option, shape) == storage_bits(Integer(), option, shape) + more
    assert _format(grouping="salience").packed_layout(option, (2, 32 * 300))["group_members"][1] == torch.int16


def test_what_reads_packed_codes_refuses_it_and_the_reference_takes_it() -> None:
    choice = choose_backend(spec_of(_format(Integer(symmetric=True)), Option(4, 32), (64, 64)))
    assert choice.name == "reference"
    assert "cannot read qweight" in choice.refusals["cpu"]
    check_backend(choice.backend, format=_format(grouping="salience"), bits=(4,))


def test_formats_that_cannot_be_inside_are_refused() -> None:
    with pytest.raises(AptqError, match="codes each weight by itself"):
        _format(Vector(normalize="none"), spread=0).check(Option(2, 64), (64, 128))
    with pytest.raises(AptqError, match="leave its finetune out"):
        _format(Integer(finetune=True)).check(OPTION, (64, 64))
    with pytest.raises(AptqError, match="put it around"):
        _format(Outliers(inner=Integer())).check(OPTION, (64, 64))
    with pytest.raises(AptqError, match="put it around"):
        _format(Integer(scale_dtype="e4m3")).check(OPTION, (64, 64))
    with pytest.raises(AptqError, match="multiple of 32"):
        _format().check(Option(3, 48), (64, 96))
    with pytest.raises(AptqError, match="2 to 8 bits"):
        _format().check(Option(9, 32), (64, 64))
    with pytest.raises(AptqError, match="inner is several formats"):
        _format(Mixed(formats={"integer": Integer()}))
    with pytest.raises(AptqError, match="spread=-1"):
        _format(spread=-1)
    with pytest.raises(AptqError, match="grouping='random'"):
        _format(grouping="random")
    built = build("format", {"name": "group_bits", "inner": {"name": "integer"}, "one_bit": {"name": "float"}})
    assert built == GroupBits(inner=Integer(), one_bit=Float())
