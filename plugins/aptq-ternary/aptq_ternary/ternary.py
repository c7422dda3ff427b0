"""Ternary weights: -1, 0 or +1 times one scale per group.

Source: Li et al., "Ternary Weight Networks" (2016), equations 3 to 6; the scale is refined by alternating between
codes and scale, weighed by the curvature's diagonal where the quantizer gives one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aptq.api import AptqError, Option, QuantizedWeight

_SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_TRITS = 5
"""Ternary digits in a byte: 3^5 = 243 of its 256 values."""


@dataclass(frozen=True)
class Ternary:
    """``w = (code - 1) * scale`` with codes 0, 1, 2.

    An ``Option`` counts whole bits, so this format is the one with ``bits=2``. What is stored takes less: five codes
    share a byte, 1.6 bits a weight, and a group adds one scale. ``iterations`` is how often codes and scale are fitted
    to each other.
    """

    group_size: int = 128
    scale_dtype: str = "float16"
    iterations: int = 4

    def __post_init__(self) -> None:
        if self.scale_dtype not in _SCALE_DTYPES:
            raise AptqError(
                f"format.scale_dtype={self.scale_dtype!r} is unknown; use one of {', '.join(_SCALE_DTYPES)}."
            )
        if self.iterations < 0:
            raise AptqError(f"format.iterations={self.iterations} is not allowed; use 0 or more.")

    def check(self, option: Option, shape: tuple[int, int]) -> None:
        """Raise ``AptqError`` unless the option has 2 bits and a meaningful group size; every shape is served."""
        del shape
        if option.bits != 2:
            raise AptqError(f"Format ternary has codes of 2 bits (three of four values); got bits={option.bits}.")
        if option.group_size != -1 and option.group_size < 1:
            raise AptqError(f"A group size is -1 (a whole row) or positive; got group_size={option.group_size}.")

    def fit(self, weight: Tensor, option: Option, importance: Tensor | None = None) -> TernaryGrid:
        """Fit one scale to each group of a weight ``[heads, rows, in]``."""
        heads, _, in_features = weight.shape
        size = option.group_width(in_features)
        shares = torch.ones(heads, in_features, device=weight.device) if importance is None else importance
        scales = [
            self._scale(part, share[:, None])
            for part, share in zip(weight.split(size, -1), shares.split(size, -1), strict=True)
        ]
        order = torch.arange(in_features, device=weight.device).expand(heads, -1)
        return TernaryGrid(torch.stack(scales, dim=1), order, size, _SCALE_DTYPES[self.scale_dtype])

    def _scale(self, part: Tensor, share: Tensor) -> Tensor:
        """Return the scale ``[heads, rows]`` of a group ``[heads, rows, columns]``, rounded as it will be stored."""
        magnitude = part.abs()
        share = torch.where(share.sum(-1, keepdim=True) > 0, share, torch.ones_like(share))
        threshold = 0.7 * magnitude.mean(-1, keepdim=True)  # of TWN: nearly optimal for normal weights
        scale = torch.zeros_like(threshold)
        for _ in range(self.iterations + 1):
            kept = share * (magnitude > threshold)
            scale = (kept * magnitude).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1e-30)
            threshold = scale / 2  # nearest level: the next round's codes
        stored = scale.squeeze(-1).to(_SCALE_DTYPES[self.scale_dtype])
        if not bool(torch.isfinite(stored).all()):
            raise AptqError(
                f"A ternary scale of {scale.max().item():.3g} is not finite in {self.scale_dtype}; "
                "use format.scale_dtype=float32, or look for NaN and Inf in the model."
            )
        return stored.to(part.dtype)

    def grid(self, quantized: QuantizedWeight, option: Option) -> TernaryGrid:
        """Return the grid that a stored weight lies on; see ``aptq.api.RoundableFormat``."""
        _, in_features = quantized.codes.shape
        order = torch.arange(in_features, device=quantized.codes.device)[None]
        size = option.group_width(in_features)
        return TernaryGrid(quantized.parameters["scales"].float()[None], order, size, _SCALE_DTYPES[self.scale_dtype])

    def dequantize(self, quantized: QuantizedWeight, option: Option) -> Tensor:
        """Return ``(code - 1) * scale`` as float32 ``[out, in]``."""
        codes = quantized.codes.float() - 1.0
        size = option.group_width(codes.shape[1])
        scale = quantized.parameters["scales"].float().T  # [out, groups]
        group = torch.arange(codes.shape[1], device=codes.device) // size
        return codes * scale[:, group]

    def pack(self, quantized: QuantizedWeight, option: Option) -> dict[str, Tensor]:
        """Return ``trits`` uint8 ``[out, ceil(in / 5)]``, the first of five codes in the lowest digit; ``scales``."""
        del option
        codes = quantized.codes
        out_features, in_features = codes.shape
        padded = torch.zeros(out_features, -(-in_features // _TRITS) * _TRITS, dtype=torch.int32, device=codes.device)
        padded[:, :in_features] = codes
        digits = padded.view(out_features, -1, _TRITS) * _powers(codes.device)
        return {"trits": digits.sum(-1).to(torch.uint8), "scales": quantized.parameters["scales"].contiguous()}

    def unpack(self, tensors: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> QuantizedWeight:
        """Invert ``pack``."""
        del option
        digits = tensors["trits"].to(torch.int32)[..., None] // _powers(tensors["trits"].device) % 3
        codes = digits.to(torch.uint8).view(shape[0], -1)[:, : shape[1]]
        return QuantizedWeight(codes=codes, parameters={"scales": tensors["scales"]})

    def packed_layout(self, option: Option, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of the tensors that ``pack`` gives."""
        out_features, in_features = shape
        return {
            "trits": ((out_features, -(-in_features // _TRITS)), torch.uint8),
            "scales": ((option.num_groups(in_features), out_features), _SCALE_DTYPES[self.scale_dtype]),
        }


@dataclass(frozen=True, eq=False)
class TernaryGrid:
    """The scales of one weight and the order of its columns."""

    scale: Tensor  # [heads, groups, rows]
    order: Tensor  # [heads, in]: column at each position
    group_size: int
    stored_dtype: torch.dtype

    def permuted(self, order: Tensor) -> TernaryGrid:
        """Return the grid with position ``j`` of head ``h`` being this grid's column ``order[h, j]``."""
        return replace(self, order=self.order.gather(1, order))

    def round(self, values: Tensor, position: int | slice) -> tuple[Tensor, Tensor]:
        """Round to the nearest of -scale, 0 and +scale; see ``aptq.api.Grid.round``."""
        heads = torch.arange(self.order.shape[0], device=self.order.device)
        group = self.order[:, position] // self.group_size  # [heads] or [heads, columns]
        return self._nearest(values, self.scale[heads.view(-1, *[1] * (group.ndim - 1)), group])

    def round_entries(self, values: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Round single weights to the nearest level; see ``aptq.api.EntryGrid``."""
        head = torch.arange(values.shape[0], device=values.device)[:, None]
        group = self.order.gather(1, positions) // self.group_size
        return self._nearest(values, self.scale[head, group, rows])

    def _nearest(self, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        level = values.sign() * (values.abs() * 2 > scale)
        level = torch.where(scale > 0, level, torch.zeros_like(level))
        return (level + 1).to(torch.uint8), level * scale

    def finish(self, codes: Tensor) -> QuantizedWeight:
        """Bind codes ``[heads, in, rows]`` to the scales, columns back in their natural order."""
        heads, in_features, rows = codes.shape
        natural = torch.empty_like(codes).scatter_(1, self.order.unsqueeze(-1).expand_as(codes), codes)
        return QuantizedWeight(
            codes=natural.transpose(1, 2).reshape(heads * rows, in_features),
            parameters={"scales": self.scale.transpose(0, 1).reshape(-1, heads * rows).to(self.stored_dtype)},
        )


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([3**digit for digit in range(_TRITS)], dtype=torch.int32, device=device)
