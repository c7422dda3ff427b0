"""Blocks of inputs that share a scale: MXFP4, NVFP4 and integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aptq.activations.tokens import check_groups, joined, split, token_scale
from aptq.api import AptqError
from aptq.formats.levels import WIDTHS, levels

_WIDTHS = {"int": tuple(range(2, 9)), **WIDTHS}


@dataclass(frozen=True)
class BlockScaled:
    """``x = level * scale``, ``group_size`` consecutive inputs of a token sharing the scale of the largest of them.

    ``code="int"``: ``-m`` to ``m`` with ``m = 2^(bits-1) - 1``; ``fp`` and ``normal``: as of the format ``float``.
    ``fp`` in 4 bits is MXFP4 with ``scale_dtype="e8m0"`` and ``group_size=32``, NVFP4 with ``e4m3`` and 16.

    Sources: OCP Microscaling Formats (MX) Specification 1.0; NVIDIA, "Introducing NVFP4 for efficient and accurate
    low-precision inference" (2025), whose float32 scale of the whole tensor is each token's own here.
    """

    bits: int = 8
    code: str = "int"
    group_size: int = -1
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        check_groups(self.group_size, self.scale_dtype)
        if self.code not in _WIDTHS:
            raise AptqError(f"activation.code={self.code!r} is not known; use one of {', '.join(_WIDTHS)}.")
        if self.bits not in _WIDTHS[self.code]:
            allowed = ", ".join(map(str, _WIDTHS[self.code]))
            raise AptqError(f"Inputs with activation.code={self.code} have {allowed} bits; got bits={self.bits}.")

    def check(self, in_features: int) -> None:
        """Serve every width."""

    def quantize(self, x: Tensor) -> Tensor:
        """Return the nearest levels to ``x [..., in]``; see ``aptq.api.ActivationQuantizer``."""
        if x.numel() == 0:
            return x.clone()
        groups = split(x, x.shape[-1] if self.group_size == -1 else self.group_size)
        largest = groups.abs().amax(-1)
        if self.code == "int":
            top = float((1 << (self.bits - 1)) - 1)
            scale = token_scale(largest, top, self.scale_dtype)[..., None]
            return joined((groups / scale).round_().clamp_(-top, top).mul_(scale), x)
        table = torch.tensor(levels(self.code, self.bits, own_size=True), device=x.device)
        scale = token_scale(largest, float(table[-1]), self.scale_dtype)[..., None]
        codes = torch.bucketize(groups / scale, (table[1:] + table[:-1]) / 2)
        return joined(table[codes].mul_(scale), x)
