"""Gram matrices, built up from batches: symmetric, so that only half of each is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aptq.api import CurvatureSum, Layer

_STRIP = 256  # rows of the matrix computed at once; only its lower triangle of strips is


def empty_sum(layer: Layer, heads: int = 1) -> CurvatureSum:
    """Return sums of zeros, in float32 or the weight's dtype where that is wider."""
    width, weight = layer.shape[1], layer.weight()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return CurvatureSum(column=torch.zeros(heads, width, width, dtype=dtype, device=weight.device), tokens=0)


def add_gram(matrix: Tensor, rows: Tensor, factor: float) -> None:
    """Add ``factor * X^T X`` for ``X = rows [*, width]`` to ``matrix [width, width]``: call ``mirror`` after the last.

    Only the lower triangle, in strips, is brought up to date.
    """
    rows = rows.to(matrix.dtype)
    width = rows.shape[1]
    for start in range(0, width, _STRIP):
        stop = min(start + _STRIP, width)
        matrix[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop], alpha=factor)


def drift_between(inputs: Sequence[Tensor], full_precision: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return the sum of ``2 (x_f - x) x^T`` over the tokens of ``x [..., in]``, in shape and dtype of a Gram matrix.

    ``x_f`` is the token of ``full_precision`` in the place of ``x``. The difference is taken first: it is small.
    """
    total = torch.zeros_like(like)
    for batch, original in zip(inputs, full_precision, strict=True):
        rows = batch.reshape(-1, batch.shape[-1]).to(like.dtype)
        total.addmm_((original.reshape(rows.shape).to(like.dtype) - rows).T, rows, alpha=2.0)
    return total


def mirror(matrices: Tensor) -> None:
    """Copy the lower triangles of ``matrices [*, width, width]`` to the upper ones."""
    matrices.tril_()
    matrices += matrices.tril(-1).transpose(-1, -2)
