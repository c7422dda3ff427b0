"""Vector codebooks: contract, storage to the bit, heads, outliers, what a run of the column loop teaches them."""

import pytest
import torch
from torch import Tensor

from aptq.api import AptqError, Curvature, EntryGrid, Option, RefitGrid
from aptq.calibration.quantize import storage_bits
from aptq.formats.vector import Vector
from aptq.quantizers.foem import FOEM
from aptq.quantizers.gptaq import GPTAQ
from aptq.quantizers.gptq import GPTQ
from aptq.quantizers.nearest import Nearest
from aptq.quantizers.two_sided import TwoSided
from aptq.testing import check_format, check_quantizer

SMALL = {"bits_1": "v4-k16", "bits_2": "v2-k16", "iterations": 4}
FORMATS = {
    "defaults": (Vector(iterations=2), (2,)),
    "no scales": (Vector(**SMALL, normalize="none", group_size=16), (1, 2)),
    "column scales in bfloat16": (Vector(**SMALL, normalize="columns", scale_dtype="bfloat16"), (1, 2)),
    "length that divides nothing": (Vector(bits_2="v3-k64", normalize="rows", iterations=4), (2,)),
    "indices of 9 bits": (Vector(bits_2="v4-k512", iterations=4), (2,)),
    "residual": (Vector(bits_2="v2-k16-4", beam=16, iterations=4), (2,)),
    "outliers": (Vector(bits_2="v4-k32", outliers=0.1, outlier_codebook="v2-k16", iterations=4), (2,)),
    "all": (Vector(bits_2="v4-k16-8", beam=16, outliers=0.2, outlier_codebook="v1-k16", iterations=4), (2,)),
}


@pytest.mark.parametrize("case", FORMATS)
def test_keeps_the_contract(case: str) -> None:
    format, bits = FORMATS[case]
    check_format(format, bits, group_sizes=(16,), shapes=((8, 40), (5, 33), (1, 1)))


@pytest.mark.parametrize("quantizer", [Nearest(), GPTQ(), GPTQ(refine=1), FOEM(), GPTAQ()], ids=lambda each: str(each))
def test_works_under_every_quantizer_that_rounds_columns(quantizer: GPTQ) -> None:
    check_quantizer(quantizer, format=Vector(bits_2="v2-k8", iterations=1, refits=1), bits=(2,), shapes=((8, 24),))


def test_quantizers_that_cross_columns_say_that_they_cannot() -> None:
    curvature = Curvature(column=_correlated(1, 32), row=_correlated(1, 8), tokens=64)
    quantizer = TwoSided()
    assert not isinstance(Vector().fit(torch.randn(1, 8, 32), Option(2, -1)), EntryGrid)
    with pytest.raises(AptqError, match="two_sided"):
        quantizer.quantize(torch.randn(8, 32), quantizer.prepare(curvature), Vector(**SMALL), Option(2, -1))


def _correlated(heads: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(heads, width, width, generator=generator) / width**0.5 + 0.3
    inputs = torch.randn(heads, 4 * width, width, generator=generator) @ mixing
    return inputs.transpose(1, 2) @ inputs / inputs.shape[1]


@pytest.mark.parametrize(
    ("format", "shape", "bits"),
    [
        (Vector(bits_2="v8-k256", normalize="none"), (4096, 4096), 1.001953125),  # the paper: 1.002
        (Vector(bits_2="v8-k65536-256", normalize="none"), (4096, 4096), 3 + (65536 + 256) * 8 * 16 / 4096**2),
        (Vector(bits_2="v4-k256", normalize="both"), (576, 576), 2 + (256 * 4 + 576 + 144) * 16 / 576**2),
        (Vector(bits_2="v12-k4096-4096", normalize="none", group_size=1024), (4092, 4096), None),
    ],
)
def test_storage_is_indices_and_codebooks(format: Vector, shape: tuple[int, int], bits: float | None) -> None:
    if bits is None:  # 4 groups of columns, each with 4096 + 4096 centroids
        bits = 24 / 12 + 4 * 2 * 4096 * 12 * 16 / (shape[0] * shape[1])
    stored = storage_bits(format, Option(2, format.group_size), shape) / (shape[0] * shape[1])
    assert stored == pytest.approx(bits, rel=1e-9)


def test_storage_is_the_papers_for_llama_2_7b() -> None:
    """Table 8: vectors of 6 and 4096 centroids take 2.02 bits, as a mean over the layers of a block."""
    format, shapes = Vector(bits_2="v6-k4096", normalize="none"), [(4096, 4096)] * 4 + [(11008, 4096)] * 2
    layers = [*shapes, (4096, 11008)]
    bits = [storage_bits(format, Option(2, -1), shape) / (shape[0] * shape[1]) for shape in layers]
    assert sum(bits) / len(bits) == pytest.approx(2.02, abs=0.005)


def test_outliers_are_the_columns_of_the_largest_importance_and_lose_less() -> None:
    weight, importance = torch.randn(64, 40), torch.rand(1, 40)
    importance[0, [3, 17, 29, 31]] = 5.0
    format = Vector(bits_2="v4-k16", outliers=0.1, outlier_codebook="v2-k64")
    grid = format.fit(weight[None], Option(2, -1), importance)
    codes, values = grid.round(weight.T[None], slice(None))
    quantized = grid.finish(codes)
    assert quantized.parameters["outlier_columns"].tolist() == [3, 17, 29, 31]
    assert quantized.codes.shape == (16, 36)
    assert quantized.parameters["outlier_codes"].shape == (32, 4)
    errors = (values[0] - weight.T).square().mean(1)
    chosen = torch.zeros(40, dtype=torch.bool)
    chosen[[3, 17, 29, 31]] = True
    assert errors[chosen].max() < errors[~chosen].min()


def test_groups_of_columns_have_codebooks_of_their_own() -> None:
    weight = torch.cat([torch.randn(64, 32), torch.rand(64, 32) + 3], dim=1)
    plain, grouped = (
        Vector(bits_2="v2-k16", normalize="none", group_size=size).fit(weight[None], Option(2, size))
        for size in (-1, 32)
    )
    errors = [(grid.round(weight.T[None], slice(None))[1][0].T - weight).square().sum() for grid in (plain, grouped)]
    assert errors[1] < errors[0]


def test_heads_share_codebooks_and_vectors_stay_within_a_head() -> None:
    weight = torch.randn(3, 8, 32)
    grid = Vector(bits_2="v4-k16").fit(weight, Option(2, -1), torch.rand(3, 32))
    codes, _ = grid.round(weight.transpose(1, 2), slice(None))
    assert codes.shape == (3, 32, 2)
    assert grid.finish(codes).parameters["codebook"].shape == (1, 16, 4)


def test_heads_that_vectors_would_cross_are_refused_with_what_to_do() -> None:
    with pytest.raises(
        AptqError, match=r"8 rows of a head cannot be cut into vectors of 6 \(format.bits_2=v6-k64\); use"
    ):
        Vector(bits_2="v6-k64").fit(torch.randn(2, 8, 16), Option(2, -1))
    Vector(bits_2="v6-k64").fit(torch.randn(1, 8, 16), Option(2, -1))


def test_scales_even_out_columns_and_rows_of_unlike_size() -> None:
    weight = torch.randn(64, 64) * torch.logspace(-2, 0, 64) * torch.logspace(-2, 0, 64)[:, None]
    errors = {}
    for normalize in ("none", "columns", "rows", "both"):
        grid = Vector(bits_2="v2-k16", normalize=normalize).fit(
            weight[None], Option(2, -1), 1 / weight.square().mean(0)[None]
        )
        errors[normalize] = float(
            ((grid.round(weight.T[None], slice(None))[1][0].T - weight).square() / weight.square().mean(0)).mean()
        )
    assert errors["both"] < errors["rows"]
    assert errors["both"] < errors["columns"] < errors["none"]


def _error(format: Vector, quantizer: Nearest | GPTQ, weight: Tensor, curvature: Curvature) -> float:
    option = Option(2, format.group_size)
    rounded = quantizer.quantize(weight, quantizer.prepare(curvature), format, option)
    return curvature.quadratic(weight - format.dequantize(rounded.weight, option))


def test_error_falls_from_k_means_to_feedback_to_codebooks_fitted_to_it_to_residuals() -> None:
    """The paper's passes, on correlated inputs."""
    weight = torch.randn(128, 48, generator=torch.Generator().manual_seed(0))
    curvature = Curvature(column=_correlated(1, 48), tokens=256)
    plain, learning = (Vector(bits_2="v4-k32", refits=refits) for refits in (0, 2))
    residual = Vector(bits_2="v4-k32-8", refits=2)
    nearest = _error(plain, Nearest(), weight, curvature)
    feedback = _error(plain, GPTQ(), weight, curvature)
    fitted = _error(learning, GPTQ(), weight, curvature)
    finer = _error(residual, GPTQ(), weight, curvature)
    assert nearest > feedback > fitted > finer


def test_a_grid_learns_as_often_as_it_was_told() -> None:
    weight = torch.randn(1, 16, 32)
    grid = Vector(bits_2="v2-k16", refits=1).fit(weight, Option(2, -1))
    assert isinstance(grid, RefitGrid)
    met = 1.5 * weight.transpose(1, 2)
    better = grid.refit(met)
    assert better is not None
    errors = [(each.round(met, slice(None))[1] - met).square().sum() for each in (grid, better)]
    assert errors[1] < errors[0]
    assert better.refit(met) is None


def test_bits_that_do_not_exist_are_refused() -> None:
    with pytest.raises(AptqError, match="widths of 1 to 4 bits; got bits=5"):
        Vector().check(Option(5, -1), (64, 64))


def test_outlier_vectors_have_to_be_a_part_of_the_others() -> None:
    format = Vector(outliers=0.1, outlier_codebook="v4-k256")
    format.check(Option(2, -1), (64, 64))
    with pytest.raises(AptqError, match="outlier_codebook=v4-k256 cannot stand beside format.bits_4=v2-k256"):
        format.check(Option(4, -1), (64, 64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"normalize": "cells"}, "format.normalize='cells' is not known; use one of none, columns, rows, both"),
        ({"scale_dtype": "int8"}, "format.scale_dtype='int8' is not known"),
        ({"group_size": 0}, "group size"),
        ({"outliers": 1.0}, "format.outliers=1.0 is not allowed"),
        ({"refits": -1}, "format.refits=-1 is not allowed; use 0 or more"),
        ({"bits_3": "v4"}, "format.bits_3='v4' is no codebook"),
        ({"outliers": 0.1, "outlier_codebook": "v2-k16-16"}, "no residual centroids"),
    ],
)
def test_options_that_cannot_be_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(AptqError, match=message):
        Vector(**fields)  # type: ignore[arg-type]
