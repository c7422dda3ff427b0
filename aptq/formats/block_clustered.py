"""LO-BCQ: blocks of weights, each coded by the one of a few codebooks that serves it best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from aptq import packing
from aptq.api import AptqError, Option, QuantizedWeight
from aptq.formats.block_clusters import TOP, Codebooks, check_counts, frozen_entries, look_up, selector_bits
from aptq.formats.block_design import design
from aptq.formats.grouped import GroupedGrid, check_fields, check_group
from aptq.formats.scales import pack_scales, read_scales, scale_layout, scale_unit, stored_scale

_SOURCES = ("frozen", "calibrated")
_ENTRY_BITS = 6
_SAMPLE = 8192  # blocks that codebooks are calibrated on
_ITERATIONS = 30


@dataclass(frozen=True)
class BlockClustered:
    """``w = C_c[code] * scale``: ``group_size`` weights share a scale, ``block_size`` of them a codebook ``C_c``.

    Codebooks have ``2^bits`` entries, integers of 6 bits. ``codebooks="frozen"`` takes those that come with this
    package, designed once for normally distributed weights; ``calibrated`` designs a set for each layer, by its own
    weights and the curvature's diagonal. Both are stored with the layer. The codebook of each block is chosen when the
    grid is fitted, so that any column-wise quantizer finds its codes. Scales are rounded to ``scale_dtype`` before
    that; ``clip_steps`` > 0 searches, per group, that many other ranges, from ``clip_min`` of the full one to as much
    above it: codebooks do not end at the same entry, and scales in ``e4m3`` lie as much as 12 % apart.

    Bits a weight: ``bits + log2(num_codebooks) / block_size + scale / group_size`` and, for each layer, 6 for every
    entry.

    Source: Elangovan et al., "LO-BCQ" (arXiv 2502.05376); see ``aptq.formats.block_clusters``.
    """

    group_size: int = 64
    block_size: int = 8
    num_codebooks: int = 8
    codebooks: str = "frozen"
    scale_dtype: str = "e4m3"
    clip_steps: int = 8
    clip_min: float = 0.85

    def __post_init__(self) -> None:
        check_fields(self.group_size, self.scale_dtype, self.clip_steps, self.clip_min)
        check_counts("format", self.block_size, self.num_codebooks)
        if self.scale_dtype == "e8m0":
            raise AptqError("format.scale_dtype=e8m0 has no 0, which a group of zeros needs here; use e4m3 or a float.")
        if self.codebooks not in _SOURCES:
            raise AptqError(f"format.codebooks={self.codebooks!r} is not known; use one of {', '.join(_SOURCES)}.")

    def check(self, option: Option, shape: tuple[int, int]) -> None:
        """Raise ``AptqError`` for bits outside 2-4 or groups that are no whole number of blocks."""
        del shape
        if option.bits not in (2, 3, 4):
            raise AptqError(f"Format block_clustered has codes of 2, 3 or 4 bits; got bits={option.bits}.")
        check_group(option)
        if option.group_size != -1 and option.group_size % self.block_size:
            raise AptqError(
                f"group_size={option.group_size} is no whole number of blocks of format.block_size={self.block_size}; "
                "use a multiple of it, or -1."
            )

    def fit(self, weight: Tensor, option: Option, importance: Tensor | None = None) -> BlockGrid:
        """Choose scales and codebooks for a weight ``[heads, rows, in]`` (see the class)."""
        arrays = self._arrays(weight, option)  # [heads, rows, arrays, blocks, size]
        counts = torch.ones_like(weight[:, 0]) if importance is None else importance.to(weight.dtype)
        padded = importance is not None or arrays.shape[2:].numel() > weight.shape[-1]
        weights = self._arrays(counts[:, None], option) if padded else None
        largest = arrays.abs().amax((-1, -2)) / TOP
        unit = scale_unit(largest.max(), self.scale_dtype)
        books = Codebooks.of(frozen_entries("normal", self.num_codebooks, 1 << option.bits).to(weight))
        scale = stored_scale(largest, self.scale_dtype, unit, option.bits)
        if self.codebooks == "calibrated":
            books = _calibrated(arrays, scale, weights, books)
        least = torch.full_like(scale, float("inf"))
        chosen = torch.zeros(arrays.shape[:-1], dtype=torch.uint8, device=weight.device)
        for share in self._shares():
            tried = stored_scale(largest * share, self.scale_dtype, unit, option.bits)
            selectors, errors = books.choose(arrays / tried[..., None, None], weights)
            error = errors.sum(-1) * tried.square()
            better = error < least
            least, scale = torch.where(better, error, least), torch.where(better, tried, scale)
            chosen = torch.where(better[..., None], selectors, chosen)
        scale = torch.where(largest > 0, scale, 0.0)  # 0 need not be an entry
        return self._grid(weight, scale, chosen, books, unit)

    def _shares(self) -> list[float]:
        """Return what ranges to try: the full one first, then smaller and larger ones by turns."""
        steps = range(1, self.clip_steps // 2 + 1)
        reach = (1.0 - self.clip_min) / max(1, self.clip_steps // 2)
        return [1.0] + [1.0 + sign * reach * step for step in steps for sign in (-1, 1)]

    def _grid(self, weight: Tensor, scale: Tensor, chosen: Tensor, books: Codebooks, unit: Tensor) -> BlockGrid:
        """Return the grid of scales ``[heads, rows, arrays]`` and selectors ``[heads, rows, arrays, blocks]``."""
        width = weight.shape[-1]
        blocks = -(-width // self.block_size)
        by_block = scale[..., None].expand(chosen.shape).flatten(2)[..., :blocks].transpose(1, 2).contiguous()
        selectors = chosen.flatten(2)[..., :blocks].transpose(1, 2).contiguous()
        places = BlockGrid.places(weight, Option(1, self.block_size))
        return BlockGrid((by_block, selectors), *places, books=books, arrays=scale, unit=unit, format=self)

    def _arrays(self, values: Tensor, option: Option) -> Tensor:
        """View ``[..., in]`` as ``[..., arrays, blocks, size]``, zeros at the end of each row where it is shorter."""
        width = values.shape[-1]
        size = -(-width // self.block_size) * self.block_size if option.group_size == -1 else option.group_size
        padded: Tensor = pad(values, (0, -width % size))
        return padded.reshape(*values.shape[:-1], -1, size // self.block_size, self.block_size)

    def dequantize(self, quantized: QuantizedWeight, option: Option) -> Tensor:
        """Return ``entry * scale`` as float32 ``[out, in]`` (a transposed view of memory ``[in, out]``)."""
        codes = quantized.codes.T.int()  # [in, out]: contiguous when it comes from unpacking
        entries = quantized.parameters["codebooks"].float()
        width = codes.shape[0]
        if len(entries) > 1:
            selectors = quantized.parameters["selectors"].int().repeat_interleave(self.block_size, 0)[:width]
            codes = codes + selectors * entries.shape[1]
        scales = read_scales(quantized.parameters, self.scale_dtype)
        by_input = scales.repeat_interleave(option.group_width(width), 0)[:width]
        return look_up(entries.flatten(), codes).mul_(by_input).T

    def pack(self, quantized: QuantizedWeight, option: Option) -> dict[str, Tensor]:
        """Return ``qweight`` (planar32), the scales, ``selectors`` and ``codebooks``, 6 bits an entry.

        Selectors ``[blocks, out]`` are packed as a weight of ``blocks`` outputs, codebooks as one of a single output.
        """
        parameters = dict(quantized.parameters)
        entries, selectors = parameters.pop("codebooks"), parameters.pop("selectors", None)
        tensors = {"qweight": packing.pack(quantized.codes, option.bits)}
        tensors |= {name: scale.contiguous() for name, scale in parameters.items()}
        if selectors is not None:
            tensors["selectors"] = packing.pack(selectors, selector_bits(self.num_codebooks))
        tensors["codebooks"] = packing.pack(entries.reshape(1, -1).int() + TOP, _ENTRY_BITS)
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> QuantizedWeight:
        """Invert ``pack``."""
        parameters = dict(tensors)
        codes = packing.unpack(parameters.pop("qweight"), option.bits, shape[1])
        entries = packing.unpack(parameters["codebooks"], _ENTRY_BITS, self.num_codebooks << option.bits)
        parameters["codebooks"] = (entries.to(torch.int8) - TOP).reshape(self.num_codebooks, -1)
        if "selectors" in parameters:
            packed = parameters["selectors"]
            parameters["selectors"] = packing.unpack(packed, selector_bits(self.num_codebooks), shape[0])
        return QuantizedWeight(codes=codes, parameters=parameters)

    def packed_layout(self, option: Option, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of the tensors that ``pack`` gives."""
        out_features, in_features = shape
        bits, blocks = selector_bits(self.num_codebooks), -(-in_features // self.block_size)
        entries = self.num_codebooks << option.bits
        return {
            "qweight": (packing.packed_shape(out_features, in_features, option.bits), torch.int32),
            **scale_layout(option.num_groups(in_features), out_features, self.scale_dtype),
            **({"selectors": (packing.packed_shape(blocks, out_features, bits), torch.int32)} if bits else {}),
            "codebooks": (packing.packed_shape(1, entries, _ENTRY_BITS), torch.int32),
        }


def _calibrated(arrays: Tensor, scale: Tensor, weights: Tensor | None, start: Codebooks) -> Codebooks:
    """Design codebooks for some of a weight's blocks, evenly spaced; errors count by importance and squared scale."""
    size = arrays.shape[-1]
    blocks = (arrays / scale[..., None, None]).reshape(-1, size)
    counts = scale.square()[..., None, None] * (torch.ones_like(arrays[:1, :1, :1]) if weights is None else weights)
    counts = counts.expand_as(arrays).reshape(-1, size)
    step = max(1, len(blocks) // _SAMPLE)
    # Evenly spaced by an odd step: rows of an even number of blocks would else be seen at the same places.
    chosen = torch.arange(0, len(blocks), step | 1, device=blocks.device)
    found = design(
        blocks[chosen],
        *start.entries.shape,
        weights=counts[chosen],
        start=start.entries,
        iterations=_ITERATIONS,
    )
    return Codebooks.of(found.entries)


@dataclass(frozen=True, eq=False)
class BlockGrid(GroupedGrid):
    """Scales and selectors of the blocks of one weight, and the codebooks that they select."""

    books: Codebooks
    arrays: Tensor  # [heads, rows, arrays]: the scales, once for each array
    unit: Tensor  # [], of the scales
    format: BlockClustered

    def round(self, values: Tensor, position: int | slice) -> tuple[Tensor, Tensor]:
        """Round columns to the nearest entries; see ``aptq.api.Grid.round``."""
        return self._nearest(values, *self._at(position))

    def round_entries(self, values: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Round single weights to the nearest entry; see ``aptq.api.EntryGrid``."""
        return self._nearest(values, *self._of_entries(rows, positions))

    def _nearest(self, values: Tensor, scale: Tensor, selectors: Tensor) -> tuple[Tensor, Tensor]:
        codes, entries = self.books.round(values / scale, selectors)
        return codes, entries * scale

    def finish(self, codes: Tensor) -> QuantizedWeight:
        """Bind codes ``[heads, in, rows]`` to the parameters, columns back in their natural order."""
        scales = self._stored(self.arrays.transpose(1, 2))
        parameters = {
            **pack_scales(scales, self.format.scale_dtype, self.unit),
            "codebooks": self.books.entries.to(torch.int8),
        }
        if len(self.books.entries) > 1:
            parameters["selectors"] = self._stored(self.parameters[1])
        return QuantizedWeight(codes=self._natural(codes), parameters=parameters)
