"""The scales of binarized weights: magnitudes ``u = |w - mean|`` of one sign each, stored as one or two numbers.

Pure functions on tensors. ``magnitudes`` and ``weights`` (of their squared errors, positive) are ``[..., n]`` and
broadcast to each other; what is returned is ``(low, high)``, each ``[...]``, with ``0 <= low <= high``: a weight is
stored as ``mean -+ low`` or ``mean -+ high``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def one_scale(magnitudes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean magnitude twice: the scale of the least weighted squared error.

    Source: Rastegari et al., "XNOR-Net" (ECCV 2016), weighed.
    """
    mean = _mean(magnitudes, weights)
    return mean, mean


def residual_scales(magnitudes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales of two passes of binarization, the second one of what the first has left.

    ``s1 a1`` with ``a1 = mean u`` leaves ``s1 (u - a1)``, which is binarized with ``a2 = mean |u - a1|``; a weight may
    then be any of ``-+ a1 -+ a2``, of magnitude ``|a1 - a2|`` or ``a1 + a2``. The squared error falls by
    ``a2^2`` times the sum of weights, and further where a weight takes the nearest of the four.

    Source: Huang et al., "BiLLM" (ICML 2024), section 3.2, equation 5; weighed here.
    """
    first = _mean(magnitudes, weights)
    second = _mean((magnitudes - first.unsqueeze(-1)).abs(), weights)
    return (first - second).abs(), first + second


def split_scales(magnitudes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales on both sides of the best break point: the smaller magnitudes have one, the larger another.

    With the magnitudes sorted, and for the first ``k`` of them and the rest, each with its mean, the squared error is

        sum h u^2  -  (sum_(i <= k) h u)^2 / sum_(i <= k) h  -  (sum_(i > k) h u)^2 / sum_(i > k) h

    so that sums over beginnings give the error of every break point there is, in ``O(n log n)``. The best one is also
    the best pair of scales of all: whatever the scales, a magnitude goes to the nearer one, which is a break.

    Source: Huang et al., "BiLLM" (ICML 2024), section 3.3, which tries some break points for all outputs at once.
    """
    ordered, order = magnitudes.sort(-1)
    counted = weights.expand_as(magnitudes).gather(-1, order)
    below, mass = (counted * ordered).cumsum(-1), counted.cumsum(-1)
    above, rest = below[..., -1:] - below, mass[..., -1:] - mass
    rest[..., -1] = 0.0  # no break: all have the same scale
    tiny = torch.finfo(rest.dtype).tiny
    gain = below.square() / mass + torch.where(rest > 0, above.square() / rest.clamp(min=tiny), 0.0)
    best = gain.argmax(-1, keepdim=True)
    low = (below / mass).gather(-1, best)
    high = torch.where(rest > 0, above / rest.clamp(min=tiny), below / mass).gather(-1, best)
    return low.squeeze(-1), torch.maximum(low, high).squeeze(-1)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum(-1) / weights.expand_as(values).sum(-1)
