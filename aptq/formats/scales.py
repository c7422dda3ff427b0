"""How the scales of groups are rounded and stored: as floats, or as the bytes of block-scaled formats.

``e8m0`` and ``e4m3`` are the scales of the OCP Microscaling formats (MXFP4: a power of two) and of NVFP4 (a float of 8
bits). Both are stored as their bytes. Scales in ``e4m3`` are counted in a *unit* of their own, a float32 for the whole
tensor, such that the largest of them is the largest number that there is (448): the range is 2^-9 to 448.

Sources: OCP Microscaling Formats (MX) Specification 1.0, sections 5.4 and 6.3 (E8M0, conversion); Micikevicius et al.,
"FP8 Formats for Deep Learning" (arXiv 2209.05433) for E4M3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aptq.api import AptqError

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""Floats that scales, factors and centroids are stored in."""

SCALE_DTYPES = {**FLOATS, "e4m3": torch.uint8, "e8m0": torch.uint8}
"""What the scales of groups are stored in."""

BLOCK_SCALES = ("e4m3", "e8m0")
"""Scales of 8 bits, made for codes that keep their own size: FP4 ends at 6, not at 1."""

_E4M3 = torch.float8_e4m3fn
_LEAST, _MOST = 2.0**-9, 448.0  # of E4M3
_BIAS = 127  # of E8M0

_UNIT = "scale_unit"  # name of the stored tensor


def scale_unit(largest: Tensor, scale_dtype: str) -> Tensor:
    """Return what scales are counted in, in the shape of ``largest``: 1 but for ``e4m3``.

    Args:
        largest: the largest scale of what shares a unit.
        scale_dtype: one of ``SCALE_DTYPES``.
    """
    unit = (largest.float() / _MOST).to(largest.dtype)
    return torch.where(unit > 0, unit, 1.0) if scale_dtype == "e4m3" else torch.ones_like(unit)


def rounded_scale(scale: Tensor, scale_dtype: str, unit: Tensor) -> Tensor:
    """Return a scale as it is stored, in its own dtype; one unit where it is 0, since all that it scales is 0.

    NaN and infinity stay what they are, or become one the other; but infinity is ``e4m3``'s largest number in a finite
    unit. ``e8m0`` takes ``2^floor(log2(3/2 scale))``: for FP4, whose largest number is 6, this is the specification's
    ``2^(floor(log2(max)) - 2)``.

    Args:
        scale: of any shape, not negative.
        scale_dtype: one of ``SCALE_DTYPES``.
        unit: of ``scale_unit``, broadcasts to ``scale``.
    """
    if scale_dtype == "e4m3":
        rounded = (scale.float() / unit).clamp(_LEAST, _MOST).to(_E4M3).float() * unit
    elif scale_dtype == "e8m0":
        exponent = torch.frexp(scale.float() * 1.5).exponent - 1
        rounded = torch.ldexp(torch.ones_like(scale), exponent.clamp(-_BIAS, _BIAS))
        rounded = torch.where(torch.isfinite(scale), rounded, scale)
    else:
        rounded = scale.to(SCALE_DTYPES[scale_dtype])
    return torch.where((scale == 0) | (rounded == 0), unit.to(scale.dtype), rounded.to(scale.dtype))


def stored_scale(scale: Tensor, scale_dtype: str, unit: Tensor, bits: int) -> Tensor:
    """Return ``rounded_scale`` for the weights of a layer whose codes have so many bits.

    Raises:
        AptqError: it is not finite in ``scale_dtype``.
    """
    rounded = rounded_scale(scale, scale_dtype, unit)
    if not bool((torch.isfinite(scale) & torch.isfinite(rounded)).all()):
        raise AptqError(
            f"A weight range has a scale of {scale.max().item():.3g} at {bits} bits, not finite in {scale_dtype}; "
            "use format.scale_dtype=float32, or look for NaN and Inf in the model."
        )
    return rounded


def pack_scales(scale: Tensor, scale_dtype: str, unit: Tensor) -> dict[str, Tensor]:
    """Return what is stored of scales ``[groups, out]`` that ``stored_scale`` gave: ``scales``, ``scale_unit [1]``."""
    if scale_dtype == "e4m3":
        return {"scales": (scale.float() / unit.float()).to(_E4M3).view(torch.uint8), _UNIT: unit.float().reshape(1)}
    if scale_dtype == "e8m0":
        return {"scales": (torch.frexp(scale.float()).exponent - 1 + _BIAS).to(torch.uint8)}
    return {"scales": scale.to(SCALE_DTYPES[scale_dtype])}


def read_scales(stored: Mapping[str, Tensor], scale_dtype: str, name: str = "scales") -> Tensor:
    """Return the scales ``[groups, out]``, in float32, that ``pack_scales`` stored."""
    if scale_dtype == "e4m3":
        return stored[name].view(_E4M3).float() * stored[_UNIT]
    if scale_dtype == "e8m0":
        exponent = stored[name].int() - _BIAS
        return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    return stored[name].float()


def stored_unit(stored: Mapping[str, Tensor]) -> Tensor:
    """Return what scales that ``pack_scales`` stored are counted in, float32 ``[]``."""
    device = next(iter(stored.values())).device
    return stored[_UNIT].reshape(()) if _UNIT in stored else torch.ones((), device=device)


def scale_layout(groups: int, out_features: int, scale_dtype: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of what ``pack_scales`` stores."""
    unit = {_UNIT: ((1,), torch.float32)} if scale_dtype == "e4m3" else {}
    return {"scales": ((groups, out_features), SCALE_DTYPES[scale_dtype]), **unit}
