"""What quantizers of activations have in common: each token by itself, all of its groups at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from aptq.api import AptqError
from aptq.formats.scales import SCALE_DTYPES, rounded_scale, scale_unit


def check_groups(group_size: int, scale_dtype: str) -> None:
    """Raise ``AptqError`` for options that cannot be."""
    if group_size != -1 and group_size < 1:
        raise AptqError(f"activation.group_size={group_size} is not allowed; use -1 (all inputs) or a positive size.")
    if scale_dtype not in SCALE_DTYPES:
        raise AptqError(f"activation.scale_dtype={scale_dtype!r} is not known; use one of {', '.join(SCALE_DTYPES)}.")


def split(x: Tensor, size: int) -> Tensor:
    """View ``[..., in]`` as ``[..., groups, size]`` in float32, zeros at the end where the last group is shorter.

    No gradient goes through: ``joined`` sees to that.
    """
    groups: Tensor = pad(x.detach().float(), (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    return groups


def token_scale(largest: Tensor, top: float, scale_dtype: str) -> Tensor:
    """Return scales, as they would be stored, that take the largest magnitudes ``[..., groups]`` to ``top``.

    Each token has a unit of its own (see ``aptq.formats.scales``).
    """
    exact = largest / top
    return rounded_scale(exact, scale_dtype, scale_unit(exact.amax(-1, keepdim=True), scale_dtype))


def joined(groups: Tensor, x: Tensor) -> Tensor:
    """Return ``[..., groups, size]`` in place of ``x [..., in]``, in its dtype; gradients pass straight through."""
    values = groups.flatten(-2)[..., : x.shape[-1]].to(x.dtype)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return values
    return x + (values - x).detach()
