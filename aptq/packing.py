"""Dense packing of 1- to 16-bit codes into 32-bit words: pure functions on tensors.

The layout ("planar32") packs units of 32 consecutive inputs of one output into exactly ``bits`` words::

    packed  int32 [ceil(K / 32), bits, N]        K inputs (padded with zero codes to a multiple of 32), N outputs

so that a kernel reads consecutive words for consecutive outputs, and no code straddles a word. A width is split into
planes, from the low bits up: 3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1; 1, 2, 4 and 8 are one plane; wider codes are 8 bits
and the planes of the rest. The *primary* plane (width P,
P words) holds code ``k`` at word ``k // (32 / P)``, bit ``P * (k % (32 / P))``: for 2, 4 and 8 bits the packed tensor
is a view of GPTQ's ``qweight [K * bits / 32, N]``.

A *secondary* plane (width S) is ordered so that it merges with whole words of the primary one. Shifting a primary
word ``r`` right by ``p * P`` (p = 0, 1) and keeping the low half of each container of ``C = 2P`` bits leaves code
``k = (32 / P) * r + 2 * i + p`` in container ``i``. With ``c = 2r + p``, the code's secondary bits lie at word
``c // (C / S)``, bit ``C * i + S * (c % (C / S))`` of their plane: one shift by a constant and one mask bring all of
them above their primary bits.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

UNIT = 32
"""Codes per unit of the layout."""

_ROWS = 1024
"""Rows that ``pack_rows`` packs at a time: their single bits are in memory for a moment."""

_FEW = 1 << 16
"""Codes that are packed and unpacked in few operations, which take more memory: of so few, operations take the time."""

_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
_PLANES |= {8 + bits: (8, *planes) for bits, planes in _PLANES.items()}


@cache
def _fields(bits: int) -> tuple[tuple[int, int, int, int, int], ...]:
    """Return ``(k, word, shift, lowest bit, width)`` for every code of a unit and every plane."""
    if bits not in _PLANES:
        raise ValueError(f"Codes of {bits!r} bits cannot be packed; allowed are 1 to 16.")
    primary = _PLANES[bits][0]
    per_word, container = 32 // primary, 2 * primary
    fields = []
    first_word = low = 0
    for width in _PLANES[bits]:
        for k in range(UNIT):
            word, slot = divmod(k, per_word)
            shift = primary * slot
            if low:
                i, p = divmod(slot, 2)
                word, place = divmod(2 * word + p, container // width)
                shift = container * i + width * place
            fields.append((k, first_word + word, shift, low, width))
        first_word += width
        low += width
    return tuple(fields)


def packed_shape(out_features: int, in_features: int, bits: int) -> tuple[int, int, int]:
    """Return the shape of the packed tensor for codes ``[out, in]``."""
    return -(-in_features // UNIT), bits, out_features


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes ``[out, in]`` in ``[0, 2^bits)`` into int32 ``[ceil(in / 32), bits, out]``.

    Raises:
        ValueError: for a width outside 1-16 or a code outside its range.
    """
    fields = _fields(bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"Codes must lie in [0, {(1 << bits) - 1}]; got [{int(codes.min())}, {int(codes.max())}].")
    units, _, out_features = packed_shape(codes.shape[0], codes.shape[1], bits)
    padded = torch.zeros(units * UNIT, out_features, dtype=torch.int32, device=codes.device)
    padded[: codes.shape[1]] = codes.T
    by_unit = padded.view(units, UNIT, out_features)
    packed = torch.zeros(units, bits, out_features, dtype=torch.int32, device=codes.device)
    if codes.numel() <= _FEW:
        for words, shifts, low, width in _planes(bits, codes.device):
            packed.index_add_(1, words, ((by_unit >> low) & ((1 << width) - 1)) << shifts)  # no two share a bit
        return packed
    for k, word, shift, low, width in fields:
        packed[:, word] |= ((by_unit[:, k] >> low) & ((1 << width) - 1)) << shift
    return packed


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Invert :func:`pack`: return codes ``[out, in]``, as a transposed view of memory ``[in, out]``.

    They are uint8, or int32 where they have more than 8 bits.
    """
    units, _, out_features = packed.shape
    if units * UNIT * out_features <= _FEW and not torch.compiler.is_compiling():
        return unpack_few(packed, bits, in_features)
    dtype = torch.uint8 if bits <= 8 else torch.int32
    codes = torch.zeros(units, UNIT, out_features, dtype=dtype, device=packed.device)
    for k, word, shift, low, width in _fields(bits):
        codes[:, k] |= (((packed[:, word] >> shift) & ((1 << width) - 1)) << low).to(dtype)
    return codes.view(units * UNIT, out_features)[:in_features].T


@cache
def _planes(bits: int, device: torch.device) -> tuple[tuple[Tensor, Tensor, int, int], ...]:
    """Return, for every plane, the words ``[UNIT]`` and shifts ``[UNIT, 1]`` of all codes, its lowest bit and width."""
    planes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for _, word, shift, low, width in _fields(bits):
        planes.setdefault((low, width), []).append((word, shift))
    return tuple(
        (
            torch.tensor([word for word, _ in places], device=device),
            torch.tensor([[shift] for _, shift in places], dtype=torch.int32, device=device),
            low,
            width,
        )
        for (low, width), places in planes.items()
    )


def unpack_few(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Do what :func:`unpack` does in a few operations and four times the memory: for a few outputs."""
    units, _, out_features = packed.shape
    codes = torch.zeros(units, UNIT, out_features, dtype=torch.int32, device=packed.device)
    for words, shifts, low, width in _planes(bits, packed.device):
        codes |= ((packed[:, words] >> shifts) & ((1 << width) - 1)) << low
    narrow = codes.to(torch.uint8 if bits <= 8 else torch.int32)
    return narrow.view(units * UNIT, out_features)[:in_features].T


def unpack_inputs(packed: Tensor, bits: int, inputs: Tensor) -> Tensor:
    """Return the codes ``[out, n]`` of some inputs (``[n]``, int64) of what :func:`pack` gave, reading their units."""
    codes = unpack_few(packed[inputs // UNIT], bits, len(inputs) * UNIT)
    return codes[:, torch.arange(len(inputs), device=packed.device) * UNIT + inputs % UNIT]


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``[rows, n]`` in ``[0, 2^bits)``, bits up to 32, into int32 ``[rows, ceil(n bits / 32)]``.

    Code ``i`` of a row takes the bits ``[i bits, (i + 1) bits)`` of its stream, which is cut into words, the lowest bit
    first; a code may lie in two words. This is how other programs store codes.
    """
    places = torch.arange(32, dtype=torch.int64, device=codes.device)
    parts = []
    for part in codes.split(_ROWS):
        stream = (part[:, :, None] >> torch.arange(bits, dtype=codes.dtype, device=codes.device)) & 1
        stream = torch.nn.functional.pad(stream.flatten(1), (0, -part.shape[1] * bits % 32))
        words = (stream.view(len(part), -1, 32).to(torch.int64) << places).sum(-1)
        parts.append(torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32))
    return torch.cat(parts)
