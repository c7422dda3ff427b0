"""Curvature, and who observes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from aptq.api.model import Block, BlockInputs, Layer

_STRIP = 256  # columns of a Hessian at once


@dataclass(eq=False, kw_only=True)
class CurvatureSum:
    """Un-normalised sums of one rank, added over ranks before anything is divided.

    Layers that share their input map to the *same* object: it is reduced, factorized and stored once.
    """

    column: Tensor  # [heads, in, in], float32 (float64 for weights in float64)
    tokens: int  # how many tokens were added: fewer than the block saw for the experts of a mixture
    row: Tensor | None = None  # [heads, rows, rows]
    drift: Tensor | None = None  # [heads, in, in], as ``column``; see ``Curvature``


@dataclass(frozen=True, eq=False, kw_only=True)
class Curvature:
    """The curvature that a layer's rounding error is weighed with.

    ``column [heads, in, in]`` is symmetric and positive semi-definite, float32, per token and per average row (see
    the module's docstring). ``row [heads, rows, rows]``, where an estimator gives it, is the same Hessian per average
    *column*: the second factor that two-sided quantizers use. ``tokens`` is how many tokens reached the layer.

    ``drift [heads, in, in]`` is the sum over tokens of ``2 (x_f - x) x^T``, in the weighting and unit of ``column``,
    with ``x_f`` the input that the full-precision model has in the place of ``x``. Its rows go with ``x_f - x``: it is
    not symmetric. It is None unless the quantizer asked for it (``DriftQuantizer``), and on inputs that are the
    full-precision model's own, where it would be zero.
    """

    column: Tensor
    tokens: int
    row: Tensor | None = None
    drift: Tensor | None = None

    @property
    def heads(self) -> int:
        """Number of row blocks with a Hessian of their own."""
        return self.column.shape[0]

    def trace(self, out_features: int) -> float:
        """Return the trace of the whole Hessian over all ``out * in`` weights (rows x sum of the heads' traces)."""
        return out_features / self.heads * self.column.diagonal(dim1=1, dim2=2).double().sum().item()

    def relative_row(self) -> Tensor | None:
        """Return ``row`` divided by its mean diagonal, so that the whole Hessian is about ``row (x) column``."""
        if self.row is None:
            return None
        mean = self.row.diagonal(dim1=1, dim2=2).mean(1)
        return self.row / torch.where(mean > 0, mean, torch.ones_like(mean))[:, None, None]

    def quadratic(self, difference: Tensor) -> float:
        """Return ``tr(R D H D^T) / 2`` for a weight difference ``D [out, in]``: the objective's second-order change.

        ``H`` is ``column`` and ``R`` is ``relative_row``, or the identity where there is none. Goes over ``H`` in
        strips of columns: what is right of the diagonal strip equals what is below it.
        """
        difference = difference.to(self.column.dtype).reshape(self.heads, -1, difference.shape[-1])
        row = self.relative_row()
        mixed = difference if row is None else row @ difference
        total = torch.zeros((), dtype=torch.float64, device=self.column.device)
        for start in range(0, difference.shape[-1], _STRIP):
            strip = slice(start, start + _STRIP)
            weighed = difference[..., strip] @ self.column[:, strip, strip]
            if start:
                weighed += 2 * (difference[..., :start] @ self.column[:, :start, strip])
            total += torch.sum(weighed * mixed[..., strip], dtype=torch.float64)
        return 0.5 * total.item()


class BlockObserver(Protocol):
    """Collects curvature while a block runs."""

    def __call__(self, inputs: BlockInputs) -> Tensor | None:
        """Run the block on one batch, add to the sums, return the block's outputs unchanged.

        May return None, having run only as far as it had to, when it was told that outputs are not needed.
        """

    def sums(self) -> Mapping[str, CurvatureSum]:
        """Return the sums of every layer of the block by name."""


@runtime_checkable
class HessianEstimator(Protocol):
    """Which curvature a layer's rounding error is weighed with."""

    def observe(self, block: Block, *, need_outputs: bool = True) -> AbstractContextManager[BlockObserver]:
        """Watch a block: hooks are on inside the context and gone after it, however it ends.

        Sums must not depend on how samples are batched or split over ranks, nor on ``need_outputs``: False allows the
        observer to stop a forward pass when there is nothing left to see in it.
        """


class LayerObserver(Protocol):
    """Tells the curvature of a block's layers one after the other, while the block's forward passes wait at each."""

    def curvature_sum(self, layer: Layer, inputs: Sequence[Tensor], samples: Sequence[Sequence[int]]) -> CurvatureSum:
        """Return this rank's sums for a layer that all its batches have come to.

        Args:
            layer: the layers before it in the block may have been rounded.
            inputs: what it is about to be called with, ``[..., in]``, by batch; none where the block never calls it.
            samples: which of all calibration samples these are, by batch.

        Returns:
            the same *object* as for the layer before, where the two share their curvature.
        """


@runtime_checkable
class SequentialEstimator(HessianEstimator, Protocol):
    """An estimator that can tell a layer's curvature as soon as all samples have come to the layer.

    Pass 2 can then round it at once, calibrates the next layer behind it, and runs a block once instead of twice.
    """

    def watch(self, block: Block) -> AbstractContextManager[LayerObserver]:
        """Watch a block as ``observe`` does, its batches running side by side from layer to layer."""


@runtime_checkable
class GuidedEstimator(HessianEstimator, Protocol):
    """An estimator that weighs errors by the gradient of the model's loss.

    Before its first pass the engine runs the full-precision model forwards and backwards over all samples, and keeps
    the mean square of the loss's gradient at the outputs that the estimator names, token by token, in
    ``Block.guidance``: ``[all samples, tokens, groups]``, zero for samples of other ranks.
    """

    @property
    def labels(self) -> str | None:
        """What the loss compares predictions with.

        "data" (the next token of the text), "model" (a token drawn from the prediction), "both" (one loss of each, and
        the mean of what they give), or None where the present options need no gradients.
        """

    @property
    def seed(self) -> int:
        """Of what is drawn."""

    def guides(self, block: Block) -> Mapping[str, int]:
        """Return the modules of a block, by full name, whose outputs count, and in how many groups of channels.

        A module returns ``[samples, tokens, channels]`` or a tuple that begins with it. A head is a block too.

        Raises:
            AptqError: the block cannot be measured so.
        """


class DriftObserver(LayerObserver, Protocol):
    """A layer observer that can be given the full-precision model's inputs as well."""

    def curvature_sum(
        self,
        layer: Layer,
        inputs: Sequence[Tensor],
        samples: Sequence[Sequence[int]],
        full_precision: Sequence[Tensor] | None = None,
    ) -> CurvatureSum:
        """Return the sums as ``LayerObserver`` does, with their ``drift`` where ``full_precision`` is given.

        ``full_precision`` is what the layer is called with in the full-precision model, by batch, token for token.
        """


@runtime_checkable
class DriftEstimator(SequentialEstimator, Protocol):
    """An estimator that can tell how far a layer's inputs have drifted from the full-precision model's."""

    @property
    def gives_drift(self) -> bool:
        """Whether it can with its present options."""

    def watch(self, block: Block) -> AbstractContextManager[DriftObserver]:
        """Watch a block as ``SequentialEstimator`` does."""
