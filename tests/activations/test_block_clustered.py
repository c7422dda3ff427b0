"""LO-BCQ for inputs: held against a loop over tokens, groups, blocks and codebooks."""

import pytest
import torch

from aptq.activations.block_clustered import BlockClustered
from aptq.activations.block_scaled import BlockScaled
from aptq.activations.tokens import token_scale
from aptq.api import AptqError
from aptq.formats.block_clusters import frozen_entries
from aptq.testing import check_activation


@pytest.mark.parametrize(
    "activation",
    [
        BlockClustered(),
        BlockClustered(num_codebooks=1, group_size=-1, scale_dtype="float16"),
        BlockClustered(num_codebooks=16, block_size=4, group_size=20, scale_dtype="float32"),
    ],
)
def test_keeps_the_contract(activation: BlockClustered) -> None:
    check_activation(activation)


def test_each_block_takes_its_best_codebook() -> None:
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)) ** 3
    found = BlockClustered(group_size=32, num_codebooks=4).quantize(x)
    books = frozen_entries("activations", 4, 16).float()
    for token, row in enumerate(x):
        scales = token_scale(row.view(3, 32).abs().amax(1), 31.0, "e4m3")
        for block in range(12):
            mine, scale = row[8 * block : 8 * block + 8], scales[block // 4]
            candidates = [book[(mine[:, None] / scale - book).abs().argmin(1)] * scale for book in books]
            best = min(float((each - mine).square().sum()) for each in candidates)
            error = float((found[token, 8 * block : 8 * block + 8] - mine).square().sum())
            assert error == pytest.approx(best, rel=1e-4, abs=1e-9)


def test_it_loses_less_than_nvfp4_on_inputs_with_heavy_tails() -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)) ** 3
    clustered, nvfp4 = BlockClustered(), BlockScaled(bits=4, code="fp", group_size=16, scale_dtype="e4m3")
    errors = [float((each.quantize(x) - x).square().sum()) for each in (clustered, nvfp4)]
    assert errors[0] < errors[1]


def test_groups_are_whole_numbers_of_blocks() -> None:
    with pytest.raises(AptqError, match=r"activation\.group_size=20 .*activation\.block_size=8"):
        BlockClustered(group_size=20)
