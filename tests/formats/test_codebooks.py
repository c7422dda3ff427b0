"""Codebooks of vectors: how they are written, searched and looked up."""

import pytest
import torch

from aptq.api import AptqError
from aptq.formats.codebooks import Codebook, Spec, fitted
from aptq.formats.kmeans import KMeans


def test_a_codebook_is_written_as_its_checkpoints_are_named() -> None:
    assert Spec.parse("v8-k65536-256", "key") == Spec(8, 65536, 256)
    spec = Spec.parse("v6-k4096", "key")
    assert (spec.length, spec.index_bits, spec.residual_bits) == (6, 12, 0)


@pytest.mark.parametrize("text", ["", "v4", "k256", "v4-k256-", "v4-k256-16-16", "v4k256", "v4-k-256"])
def test_other_spellings_are_answered_with_an_example(text: str) -> None:
    with pytest.raises(AptqError, match=r"format\.bits_2=.* is no codebook; write v4-k256"):
        Spec.parse(text, "format.bits_2")


@pytest.mark.parametrize("text", ["v0-k256", "v65-k2", "v4-k1", "v4-k100", "v4-k131072", "v4-k256-3", "v4-k256-0"])
def test_codebooks_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(AptqError, match="is not allowed; use vectors of 1 to 64 weights, and powers of two"):
        Spec.parse(text, "format.bits_2")


def _residual(beam: int) -> Codebook:
    generator = torch.Generator().manual_seed(0)
    main, residual = (torch.randn(k, 4, generator=generator) * scale for k, scale in ((16, 1.0), (8, 0.6)))
    return Codebook(main, residual, beam)


def test_a_beam_of_all_centroids_finds_the_nearest_sum() -> None:
    book, vectors = _residual(beam=16), torch.randn(200, 4)
    sums = (book.main[None] + book.residual[:, None]).flatten(0, 1)  # [8 * 16, 4], a sum's place being its code
    codes, values = book.encode(vectors)
    assert torch.equal(codes, torch.cdist(vectors, sums).argmin(1))
    assert torch.equal(values, sums[codes])
    assert book.bits == 7


def test_a_wider_beam_finds_no_worse() -> None:
    vectors = torch.randn(200, 4)
    errors = [(_residual(beam).encode(vectors)[1] - vectors).square().sum(1) for beam in (1, 2, 16)]
    assert bool((errors[1] <= errors[0] + 1e-6).all())
    assert bool((errors[2] <= errors[1] + 1e-6).all())
    assert float(errors[2].sum()) < float(errors[0].sum())


def test_long_vectors_are_cut_and_of_short_ones_the_beginning_counts() -> None:
    book = Codebook(torch.randn(16, 2))
    codes, values = book.encode(torch.randn(30, 5))
    digits = torch.stack([codes >> 4 * number & 15 for number in range(3)], dim=1)
    assert torch.equal(values, book.main[digits].flatten(1)[:, :5])
    short = torch.randn(30, 1)
    assert torch.equal(book.encode(short)[0], (short - book.main[:, 0]).abs().argmin(1))


def test_residual_centroids_are_fitted_to_what_is_left_over() -> None:
    vectors, weights = torch.randn(2000, 4), torch.rand(2000)
    errors = []
    for spec in (Spec(4, 16), Spec(4, 16, 16), Spec(4, 256)):
        book = fitted(vectors, weights, spec, KMeans(), beam=16)
        errors.append(float(((book.encode(vectors)[1] - vectors).square().sum(1) * weights).sum()))
    assert errors[0] > errors[1] > errors[2], "256 free centroids do better than 256 sums, and these than 16 centroids"


def test_what_is_stored_is_what_is_used_and_must_be_finite() -> None:
    book = _residual(beam=4).stored(torch.float16)
    assert torch.equal(book.main, book.main.half().float())
    assert book.residual is not None
    assert torch.equal(book.residual, book.residual.half().float())
    with pytest.raises(AptqError, match="not finite in torch.float16; use format.scale_dtype=float32"):
        Codebook(torch.full((2, 2), 1e6)).stored(torch.float16)
