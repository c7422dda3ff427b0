"""Rounding by the codebook that serves a block best, against its definition."""

import pytest
import torch

from aptq.api import AptqError
from aptq.formats.block_clusters import COUNTS, TOP, Codebooks, check_counts, frozen_entries, selector_bits
from tests.formats.blocks import random_blocks, random_books, squares


def test_looking_up_is_rounding_to_the_nearest_entry() -> None:
    entries = random_books(8, 16, 4).float()
    books = Codebooks.of(entries)
    blocks = (random_blocks(400, 5) * 1.3).float()
    chosen, least = books.choose(blocks)
    errors = squares(blocks, entries).sum(-1)
    assert torch.allclose(least, errors.amin(0), rtol=1e-5, atol=1e-5)
    assert torch.allclose(errors.gather(0, chosen.long()[None])[0], errors.amin(0), rtol=1e-5, atol=1e-5)
    codes, values = books.round(blocks, chosen[:, None])
    assert torch.equal(values, entries[chosen.long()[:, None], codes.long()])
    assert torch.allclose((values - blocks).square().sum(-1), least, rtol=1e-5, atol=1e-5)


def test_a_midpoint_belongs_to_the_upper_entry_and_nothing_is_out_of_reach() -> None:
    books = Codebooks.of(torch.tensor([[-5.0, 2.0, 3.0]]))
    codes, values = books.round(torch.tensor([2.5, -1.5, 1e9, -1e9, float("inf"), float("nan")]), torch.zeros(6))
    assert values[:5].tolist() == [3.0, 2.0, 3.0, -5.0, 3.0]
    assert codes[:5].tolist() == [2, 1, 2, 0, 2]


def test_weights_decide_which_codebook_a_block_takes() -> None:
    books = Codebooks.of(torch.tensor([[-1.0, 1.0], [-10.0, 10.0]]))
    block = torch.tensor([[1.0, 10.0]])
    assert books.choose(block, torch.tensor([1.0, 0.0]))[0].item() == 0
    assert books.choose(block, torch.tensor([0.0, 1.0]))[0].item() == 1


@pytest.mark.parametrize("count", COUNTS)
def test_frozen_codebooks_are_rising_integers_of_six_bits(count: int) -> None:
    for source, levels in (("normal", 4), ("normal", 8), ("normal", 16), ("activations", 16)):
        entries = frozen_entries(source, count, levels).int()
        assert entries.shape == (count, levels)
        assert bool((entries.diff(dim=1) > 0).all())
        assert int(entries.abs().max()) <= TOP


def test_more_frozen_codebooks_serve_normal_numbers_better() -> None:
    groups = torch.randn(500, 64, generator=torch.Generator().manual_seed(7))
    blocks = (groups / groups.abs().amax(1, keepdim=True) * TOP).reshape(-1, 8)
    errors = [float(Codebooks.of(frozen_entries("normal", n, 16).float()).choose(blocks)[1].mean()) for n in COUNTS]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[0]


def test_numbers_that_cannot_be_are_refused() -> None:
    with pytest.raises(AptqError, match=r"format\.num_codebooks=3 .* 1, 2, 4, 8, 16"):
        check_counts("format", 8, 3)
    with pytest.raises(AptqError, match=r"activation\.block_size=0"):
        check_counts("activation", 0, 8)
    assert [selector_bits(count) for count in COUNTS] == [0, 1, 2, 3, 4]
