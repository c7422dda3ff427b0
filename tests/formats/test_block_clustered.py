"""Blocks that choose their codebook: contract, storage, and what it is for."""

import pytest
import torch
from torch import Tensor

from aptq.api import AptqError, Option
from aptq.calibration.quantize import storage_bits
from aptq.formats.block_clustered import BlockClustered
from aptq.formats.float import Float
from aptq.formats.integer import Integer
from aptq.quantizers.gptq import GPTQ
from aptq.quantizers.two_sided import TwoSided
from aptq.testing import check_backend, check_format, check_quantizer

FORMATS = [
    BlockClustered(clip_steps=2),
    BlockClustered(num_codebooks=1, block_size=4, scale_dtype="float16", clip_steps=0),
    BlockClustered(num_codebooks=2, codebooks="calibrated", scale_dtype="bfloat16", clip_steps=0),
]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.num_codebooks}-{format.codebooks}")
def test_keeps_the_contract(format: BlockClustered) -> None:
    bits = (2, 4) if format.codebooks == "frozen" else (4,)
    check_format(format, bits=bits, group_sizes=(16,), shapes=((6, 40), (5, 33), (1, 1)))


@pytest.mark.parametrize("quantizer", [GPTQ(), TwoSided()])
def test_works_under_other_quantizers_than_nearest(quantizer: GPTQ | TwoSided) -> None:
    check_quantizer(quantizer, format=BlockClustered(clip_steps=0), bits=(4,), shapes=((6, 40),))


def test_the_reference_backend_runs_it() -> None:
    from aptq.backends.reference import Reference

    check_backend(
        Reference(),
        format=BlockClustered(clip_steps=0),
        format_name="block_clustered",
        bits=(4,),
        dtypes=(torch.float32,),
        shapes=((24, 40), (5, 33)),
    )


def _error(
    format: BlockClustered | Float | Integer, weight: Tensor, option: Option, importance: Tensor | None = None
) -> float:
    grid = format.fit(weight[None], option, None if importance is None else importance[None])
    values = grid.round(weight.T[None], slice(None))[1][0].T
    counts = 1.0 if importance is None else importance
    return float(((values - weight).square() * counts).mean())


def test_it_loses_less_than_formats_of_the_same_size() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    clustered = _error(BlockClustered(clip_steps=0), weight, Option(4, 64))
    nvfp4 = _error(Float(code="fp", scale_dtype="e4m3", clip_steps=0), weight, Option(4, 16))
    integer = _error(Integer(symmetric=True, scale_dtype="e4m3", clip_steps=0), weight, Option(4, 16))
    assert clustered < 0.6 * min(nvfp4, integer)


def test_searching_ranges_and_calibrating_lower_the_error_that_counts() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(48, 256, generator=generator) ** 3  # heavy tails: nothing like what was designed for
    importance = torch.rand(256, generator=generator) ** 2
    option = Option(4, 64)
    plain = _error(BlockClustered(clip_steps=0), weight, option, importance)
    searched = _error(BlockClustered(), weight, option, importance)
    calibrated = _error(BlockClustered(codebooks="calibrated"), weight, option, importance)
    assert calibrated < searched < plain


@pytest.mark.parametrize(
    ("num_codebooks", "group_size", "bits"), [(8, 64, 4.5), (16, 64, 4.625), (2, 64, 4.25), (16, 128, 4.5625)]
)
def test_bits_are_those_of_the_paper_and_the_codebooks(num_codebooks: int, group_size: int, bits: float) -> None:
    format, shape = BlockClustered(num_codebooks=num_codebooks), (1024, 1024)
    stored = storage_bits(format, Option(4, group_size), shape)
    own = num_codebooks * 16 * 6 + 32  # codebooks and the unit of scales
    assert stored == bits * 1024 * 1024 + own


def test_frozen_codebooks_are_stored_with_the_layer() -> None:
    weight, option = torch.randn(1, 32, 64), Option(4, 64)
    stored = []
    for source in ("frozen", "calibrated"):
        format = BlockClustered(codebooks=source)
        grid = format.fit(weight, option)
        stored.append(format.pack(grid.finish(grid.round(weight.transpose(1, 2), slice(None))[0]), option))
    frozen, calibrated = stored
    assert frozen.keys() == calibrated.keys()
    assert not torch.equal(frozen["codebooks"], calibrated["codebooks"])
    other = BlockClustered(codebooks="calibrated")  # any of the two reads both
    read = other.dequantize(other.unpack(frozen, option, (32, 64)), option)
    assert float((read - weight[0]).square().mean()) < 0.01


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(AptqError, match="bits=5"):
        BlockClustered().check(Option(5, 64), (8, 64))
    with pytest.raises(AptqError, match=r"group_size=12 .*block_size=8"):
        BlockClustered().check(Option(4, 12), (8, 64))
    with pytest.raises(AptqError, match="e8m0 has no 0"):
        BlockClustered(scale_dtype="e8m0")
    with pytest.raises(AptqError, match="use one of frozen, calibrated"):
        BlockClustered(codebooks="learned")
