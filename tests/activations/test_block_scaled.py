"""MXFP4, NVFP4 and integers for inputs: held against a loop over tokens and groups."""

import math

import pytest
import torch
from torch import Tensor

from aptq.activations.block_scaled import BlockScaled
from aptq.api import AptqError, Option
from aptq.config import compose
from aptq.formats.float import Float
from aptq.registry import build
from aptq.testing import check_activation

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4", "int8", "block_scaled"])
def test_presets_keep_the_contract(name: str) -> None:
    check_activation(build("activation", compose([f"activation={name}"]).activation))


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32", "e4m3", "e8m0"])
@pytest.mark.parametrize(("code", "bits"), [("int", 3), ("fp", 3), ("normal", 4)])
def test_all_codes_and_scales_keep_the_contract(code: str, bits: int, scale_dtype: str) -> None:
    check_activation(BlockScaled(bits=bits, code=code, group_size=16, scale_dtype=scale_dtype))


def _tokens() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 70, generator=generator) * torch.rand(6, 1, generator=generator) ** 4 * 100


def test_mxfp4_is_that_of_the_specification() -> None:
    x = _tokens()
    found = BlockScaled(bits=4, code="fp", group_size=32, scale_dtype="e8m0").quantize(x)
    signed = torch.tensor(sorted({sign * each for each in E2M1 for sign in (-1, 1)}))
    for token, row in enumerate(x):
        for start in range(0, 70, 32):
            block = row[start : start + 32]
            scale = 2.0 ** (math.floor(math.log2(float(block.abs().max()))) - 2)
            nearest = signed[(block[:, None] / scale - signed).abs().argmin(1)] * scale
            assert torch.equal(found[token, start : start + 32], nearest)


def test_nvfp4_of_one_token_is_the_weight_format_of_a_row() -> None:
    x = _tokens()
    found = BlockScaled(bits=4, code="fp", group_size=16, scale_dtype="e4m3").quantize(x)
    format = Float(group_size=16, code="fp", scale_dtype="e4m3", clip_steps=0)
    for token, row in enumerate(x):
        grid = format.fit(row[None, None], Option(4, 16))
        assert torch.allclose(found[token], grid.round(row[None, :, None], slice(None))[1][0, :, 0], rtol=1e-6)


def test_integers_of_eight_bits_per_token_lose_little() -> None:
    x = torch.randn(20, 64)
    found = BlockScaled(scale_dtype="float32").quantize(x)
    step = x.abs().amax(1, keepdim=True) / 127
    assert float(((found - x) / step).abs().max()) <= 0.5001


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(AptqError, match="code=fp have 3, 4 bits; got bits=8"):
        BlockScaled(code="fp")
    with pytest.raises(AptqError, match="use one of int, normal, fp"):
        BlockScaled(code="integer")
