"""The two steps of LO-BCQ against their definitions, in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aptq.formats.block_clusters import TOP
from aptq.formats.block_design import assign, design, distinct, lloyd_max, update
from tests.formats.blocks import random_blocks, random_books, squares


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, 5]), st.sampled_from([2, 4, 16]), st.booleans())
def test_the_error_never_rises(seed: int, count: int, levels: int, weighted: bool) -> None:
    blocks = random_blocks(60, seed)
    weights = torch.rand(60, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    found = design(blocks, count, levels, weights=weights if weighted else None, tolerance=-1.0, iterations=12)
    for errors in (found.errors, found.integer_errors):
        assert all(later <= earlier * (1 + 1e-12) for earlier, later in zip(errors, errors[1:], strict=False))
    u = weights if weighted else torch.ones_like(blocks)
    exact = (squares(blocks, found.entries) * u).sum(-1).amin(0).sum() / u.sum()
    assert exact <= found.integer_errors[-1] * (1 + 1e-9)


def test_integers_of_six_bits_come_out_all_different() -> None:
    found = design(random_blocks(200, 0) * 0.05, 4, 16)  # close to 0: many entries would round to the same
    assert found.entries.shape == (4, 16)
    assert torch.equal(found.entries, found.entries.round())
    assert float(found.entries.abs().max()) <= TOP
    assert bool((found.entries.diff(dim=1) > 0).all())
    assert torch.equal(distinct(torch.tensor([[0.1, 0.2, 31.0, 40.0]])), torch.tensor([[0.0, 1.0, 30.0, 31.0]]))


def test_one_codebook_is_that_of_lloyd_max() -> None:
    blocks = random_blocks(300, 1)
    found = design(blocks, 1, 8, tolerance=0.0)
    assert torch.allclose(found.real[0], lloyd_max(blocks.flatten(), torch.ones(2400).double(), 8), rtol=0.2, atol=0.5)
    midpoints = (found.real[0, 1:] + found.real[0, :-1]) / 2
    codes = torch.bucketize(blocks.flatten(), midpoints)
    means = torch.stack([blocks.flatten()[codes == code].mean() for code in range(8)])
    assert torch.allclose(found.real[0], means, atol=0.05)


def test_assigning_and_updating_are_what_they_say() -> None:
    blocks, books = random_blocks(50, 2), random_books(4, 6, 3)
    weights = torch.rand(50, 8, dtype=torch.float64)
    errors = (squares(blocks, books) * weights).sum(-1)
    chosen, least = assign(blocks, weights, books)
    assert torch.equal(chosen, errors.argmin(0))
    assert torch.allclose(least, errors.amin(0))
    fresh = update(blocks, weights, books, chosen, whole=False)
    for number in range(4):
        mine, counts = blocks[chosen == number].flatten(), weights[chosen == number].flatten()
        codes = (mine[:, None] - books[number]).abs().argmin(1)
        for code in range(6):
            if bool((codes == code).any()):
                mean = (mine * counts)[codes == code].sum() / counts[codes == code].sum()
                assert float((fresh[number] - mean).abs().min()) < 1e-9


def test_idle_entries_move_to_where_most_is_lost() -> None:
    blocks = torch.tensor([[1.0, 1.0, 20.0, 20.0]])
    books = torch.tensor([[-30.0, 10.0]])
    fresh = update(blocks, torch.ones_like(blocks), books, torch.zeros(1, dtype=torch.long), whole=False)
    assert fresh.tolist() in ([[1.0, 10.5]], [[10.5, 20.0]])
