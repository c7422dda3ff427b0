"""What backends that read the planar layout ask of a format's tensors, whatever the format is called."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from aptq import packing
from aptq.api import LayerSpec
from aptq.meaning import Blocks, Integers, Levels, States, meaning_of

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of activations, and of scales that are stored as what they are."""


def refuses_dtype(spec: LayerSpec, allowed: Sequence[torch.dtype]) -> str | None:
    """Refuse activations of other dtypes than some."""
    if spec.dtype in allowed:
        return None
    *first, last, found = (str(dtype).removeprefix("torch.") for dtype in (*allowed, spec.dtype))
    return f"it takes activations of {', '.join(first)}{' and ' if first else ''}{last}, not {found}"


def refuses_groups(spec: LayerSpec, allowed: Collection[int]) -> str | None:
    """Refuse groups of other sizes than some, and a last one that is shorter."""
    size = spec.option.group_width(spec.in_features)
    if size in allowed and spec.in_features % size == 0:
        return None
    told = ", ".join(map(str, allowed))
    return f"it takes whole groups of {told} inputs, not {spec.in_features} inputs in groups of {size}"


def refuses_levels(spec: LayerSpec) -> str | None:
    """Refuse layers whose tensors are not as ``unreadable`` expects, and codes that are no integers."""
    if (reason := unreadable(spec)) is not None:
        return reason
    if isinstance(meaning_of(spec.format, spec.option), Integers):
        return None
    return f"it takes integers, not the levels of format {spec.format_name}"


def unreadable(
    spec: LayerSpec, scale_dtypes: Collection[torch.dtype] = FLOATS, states: bool = False, blocks: bool = False
) -> str | None:
    """Say what of a layer's tensors is not as expected, or None.

    Expected are codes of at most 8 bits (``qweight``, see ``aptq.packing``), scales ``[groups, out]`` of one of some
    dtypes, for levels below 0 perhaps some of their own (``scales_below``), zeros packed along the outputs
    (``qzeros``), and codes that mean integers or levels times a scale, or where ``states`` are read, values of those.
    Where ``blocks`` are, scales may be bytes, and codes mean entries of codebooks.
    """
    bits, shape = spec.option.bits, (spec.out_features, spec.in_features)
    if bits > 8:
        return f"it reads codes of at most 8 bits, not {bits}"
    layout = spec.format.packed_layout(spec.option, shape)
    if blocks:
        scale_dtypes = (*scale_dtypes, torch.uint8)
    scales = (spec.option.num_groups(spec.in_features), spec.out_features)
    expected: dict[str, set[Any]] = {
        "qweight": {(packing.packed_shape(*shape, bits), torch.int32)},
        "scales": {(scales, dtype) for dtype in scale_dtypes},
        "scales_below": {(scales, dtype) for dtype in scale_dtypes},
        "qzeros": {(packing.packed_shape(*scales, bits), torch.int32)},
    }
    if blocks:
        expected["scale_unit"] = {((1,), torch.float32)}
    if blocks and isinstance(meaning := meaning_of(spec.format, spec.option), Blocks):
        count = -(-spec.in_features // meaning.block_size)
        selectors = packing.packed_shape(count, spec.out_features, meaning.selector_bits)
        expected |= {"selectors": {(selectors, torch.int32)}, "codebooks": {layout["codebooks"]}}
    for name, stored in layout.items():
        if stored not in expected.get(name, ()):
            return f"it cannot read {name} of format {spec.format_name}, {stored[1]} of shape {tuple(stored[0])}"
    if len({layout[name][1] for name in layout if name.startswith("scales")}) > 1:
        return f"it cannot read the scales of format {spec.format_name}, which have several dtypes"
    known = (Integers, Levels, *([States] if states else []), *([Blocks] if blocks else []))
    if not isinstance(meaning_of(spec.format, spec.option), known):
        return f"it cannot read the codes of format {spec.format_name}: neither integers nor levels times a scale"
    return None
