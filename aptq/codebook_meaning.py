"""What codes of codebooks mean, asked of the format itself; see ``aptq.meaning``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aptq import packing
from aptq.api import Format, Option
from aptq.probe import SCALES, dequantized, levels_under_bytes

_MOST_INPUTS = 1024  # of a block
_INDICES = {"indices": "codebook", "residual_indices": "residual_codebook"}

_Stored = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a stored tensor."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Blocks:
    """``w = codebook[selector][code] * scale``, with a selector for each run of inputs, and codebooks of the layer.

    ``selectors`` are packed (``aptq.packing``) as codes ``[blocks, out]``, without them there is one codebook;
    ``codebooks_of`` reads the codebooks. Where scales are stored as bytes, ``scale_values`` says what these stand for,
    times ``scale_unit [1]`` where that is stored.
    """

    block_size: int  # inputs
    count: int  # of codebooks, a power of two
    scale_values: Tensor | None  # float32 [256]; None: scales are floats

    @property
    def selector_bits(self) -> int:
        """Of a selector; 0: there are none."""
        return self.count.bit_length() - 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Vectors:
    """``w = (codebook[index] + residual_codebook[residual_index]) * row_scale * column_scale``, of ``length`` outputs.

    ``indices`` are packed (``aptq.packing``) as codes ``[ceil(out / length), in]``, and ``residual_indices`` likewise;
    codebooks are ``[groups, centroids, length]``, ``row_scales`` are of vectors and ``column_scales`` of inputs. All
    but ``indices`` and ``codebook`` may be missing. A layer may store more than that, which is not known here.
    """

    length: int
    index_bits: int
    residual_bits: int  # 0: there are no residuals


def codebooks_of(meaning: Blocks, format: Format, option: Option, codebooks: Tensor) -> Tensor:
    """Return the codebooks of a layer, float32 ``[count, 2^bits]``, from what is stored of them."""
    entries = 1 << option.bits
    selectors = torch.arange(meaning.count)[:, None].expand(-1, entries)
    codes = torch.arange(entries)[:, None].expand(-1, meaning.count * meaning.block_size)
    values = _values_of_blocks(
        meaning, format, replace(option, group_size=-1), codes, selectors, _one(meaning, entries), codebooks.cpu()
    )
    assert values is not None  # it was asked the same when its meaning was found
    return values[:, :: meaning.block_size].T.contiguous()


def _one(meaning: Blocks, outputs: int) -> Tensor:
    """Return scales of 1."""
    if meaning.scale_values is None:
        return torch.ones(outputs)
    return (meaning.scale_values == 1).nonzero()[0].to(torch.uint8).expand(outputs)


def _values_of_blocks(
    meaning: Blocks, format: Format, option: Option, codes: Tensor, selectors: Tensor, scales: Tensor, codebooks: Tensor
) -> Tensor | None:
    more = {"codebooks": codebooks, "scale_unit": torch.ones(1)}
    if meaning.count > 1:
        more["selectors"] = packing.pack(selectors, meaning.selector_bits)
    return dequantized(format, option, codes, scales, more)


def blocks_of(format: Format, option: Option, layout: Mapping[str, _Stored]) -> Blocks | None:
    """Return the blocks of a format that has codebooks, or None where values are not those of ``Blocks``."""
    names, entries = set(layout), 1 << option.bits
    if not {"qweight", "scales", "codebooks"} <= names <= {"qweight", "scales", "scale_unit", "selectors", "codebooks"}:
        return None
    generator = torch.Generator().manual_seed(0)
    shape, dtype = layout["codebooks"]
    if dtype != torch.int32:
        return None
    codebooks = torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(dtype)
    size, count = _size_of_blocks(format, option) if "selectors" in names else (_MOST_INPUTS, 1)
    if not size:
        return None
    meaning, scales = Blocks(block_size=size, count=count, scale_values=None), torch.tensor(SCALES)
    if layout["scales"][1] == torch.uint8:
        more = {"codebooks": codebooks, "scale_unit": torch.ones(1)}
        if count > 1:
            more["selectors"] = packing.pack(torch.zeros(1, 256, dtype=torch.int64), meaning.selector_bits)
        bytes_of = levels_under_bytes(format, option, torch.arange(min(entries, size)), more)
        if bytes_of is None:
            return None
        meaning = replace(meaning, scale_values=bytes_of[1])
        scales = (_one(meaning, 3).int() + torch.tensor([0, -7, 5])).to(torch.uint8)
        factors = bytes_of[1][scales.long()]
    else:
        factors = scales
    table = codebooks_of(meaning, format, option, codebooks)
    codes = torch.randint(0, entries, (3, 5 * size + size // 2), generator=generator)
    selectors = torch.randint(0, count, (-(-codes.shape[1] // size), 3), generator=generator)
    values = _values_of_blocks(meaning, format, option, codes, selectors, scales, codebooks)
    chosen = selectors.T.repeat_interleave(size, 1)[:, : codes.shape[1]]
    same = values is not None and torch.equal(values, table[chosen, codes] * factors[:, None])
    return meaning if same else None


def _size_of_blocks(format: Format, option: Option) -> tuple[int, int]:
    """Return the inputs of a block and the number of codebooks, by the shape of the selectors; (0, 0): not found."""
    for width in range(1, _MOST_INPUTS + 1):
        (_, bits, blocks), dtype = format.packed_layout(option, (1, width + 1))["selectors"]
        if blocks == 2:
            return (width, 1 << bits) if dtype == torch.int32 else (0, 0)
    return 0, 0


def vectors_of(format: Format, option: Option) -> Vectors | None:
    """Return the vectors of a format that has a codebook of them, or None where values are not those of ``Vectors``."""
    option, inputs = replace(option, group_size=16), 40
    first = format.packed_layout(option, (1, inputs))
    if not {"indices", "codebook"} <= set(first) <= {*_INDICES, *_INDICES.values(), "row_scales", "column_scales"}:
        return None
    length = first["codebook"][0][2]
    outputs = 3 * length - length // 2
    layout, generator = format.packed_layout(option, (outputs, inputs)), torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, (shape, dtype) in layout.items()
        if dtype.is_floating_point
    }
    group, expected = torch.arange(inputs) // 16, torch.zeros(())
    for indices, codebook in _INDICES.items():
        if (indices in layout) is not (codebook in tensors):
            return None
        if indices in layout:
            codes = torch.randint(0, tensors[codebook].shape[1], (3, inputs), generator=generator)
            tensors[indices] = packing.pack(codes, layout[indices][0][1])
            expected = expected + tensors[codebook].float()[group, codes]  # [3, in, length]
    by_row, by_column = (tensors.get(name, torch.ones(())).float() for name in ("row_scales", "column_scales"))
    expected = expected * by_row.reshape(-1, 1, 1) * by_column.reshape(-1, 1)
    values = format.dequantize(format.unpack(tensors, option, (outputs, inputs)), option)
    if not torch.allclose(values, expected.transpose(1, 2).flatten(0, 1)[:outputs], rtol=1e-6, atol=1e-6):
        return None
    bits = (layout[name][0][1] if name in layout else 0 for name in _INDICES)
    return Vectors(length=length, index_bits=next(bits), residual_bits=next(bits))
