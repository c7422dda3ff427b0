"""Does a format keep its promises: grids that round in any order, storage without loss, a layout that is true."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from aptq.api import EntryGrid, Format, Grid, Option, QuantizedWeight, RoundableFormat, RowFormat
from aptq.testing.assertions import (
    Shape,
    accepted,
    accepts,
    accepts_heads,
    expect,
    expect_equal,
    expect_same_levels,
    expect_same_tensors,
    random_weight,
)

__all__ = ["check_format"]

SHAPES: tuple[Shape, ...] = ((8, 64), (6, 40), (5, 33), (3, 7), (1, 1))
"""Even and odd outputs; widths that are and are not multiples of a group, of 32 and of 8; smaller than a group."""


def check_format(
    format: Format, bits: Sequence[int], *, group_sizes: Sequence[int] = (16, 32), shapes: Sequence[Shape] = SHAPES
) -> None:
    """Check a format at some widths of code.

    Every combination with ``group_sizes``, the format's own group size, -1 (per channel), ``shapes``, and one or
    several heads is tried, unless the format's ``check`` (for several heads: ``fit``) refuses it; each width must be
    accepted somewhere.

    Raises:
        AssertionError: a promise of ``aptq.api.Format`` or ``aptq.api.Grid`` is broken.
    """
    _check_refusals(format)
    for option, shape in accepted(format, bits, group_sizes, shapes):
        with torch.device("meta"):  # where models are made before their tensors are loaded
            format.check(option, shape)
            format.packed_layout(option, shape)
        divisors = [heads for heads in (2, 3, 5) if shape[0] % heads == 0]
        for heads in (1, *(each for each in divisors[:1] if accepts_heads(format, option, shape, each))):
            _check_case(format, option, shape, heads)
        _check_extremes(format, option, shape)


def _check_refusals(format: Format) -> None:
    for option in (Option(bits=0, group_size=-1), Option(bits=-1, group_size=-1), Option(bits=33, group_size=-1)):
        expect(not accepts(format, option, (8, 64)), f"check() accepts {option.bits} bits; raise AptqError.")
    for bits in range(1, 17):
        expect(
            not accepts(format, Option(bits=bits, group_size=0), (8, 64)),
            "check() accepts group_size=0; raise AptqError.",
        )


def _check_case(format: Format, option: Option, shape: Shape, heads: int) -> None:
    case = f"{option}, shape {shape}, {heads} heads"
    weight = random_weight(heads, shape, seed=shape[1] + heads)
    importance = torch.linspace(0.5, 2.0, shape[1]).expand(heads, -1).contiguous()
    for given in (None, importance):
        before = weight.clone()
        grid = format.fit(weight, option, given)
        expect_equal(weight, before, f"{case}: fit() changed the weight")
        codes, values = _round_all(grid, weight, case)
        quantized = grid.finish(codes)
        _check_meaning(format, quantized, values, option, shape, case)
        _check_storage(format, quantized, option, shape, case)
        if isinstance(format, RoundableFormat):
            _check_stored_grid(format, quantized, option, shape, case)
        if isinstance(format, RowFormat):
            _check_rows(format, quantized, option, shape, case)
        _check_order(format, grid, weight, option, case)
    error = (values - weight.transpose(1, 2)).square().sum()
    expect(
        bool(error <= weight.square().sum()),
        f"{case}: rounding loses more than storing zeros would: squared error {float(error):.4g}.",
    )


def _round_all(grid: Grid, weight: Tensor, case: str) -> tuple[Tensor, Tensor]:
    """Round all columns at once, and see that one at a time gives the same and that levels stay what they are."""
    columns = weight.transpose(1, 2).contiguous()  # [heads, in, rows]
    before = columns.clone()
    codes, values = grid.round(columns, slice(None))
    expect_equal(columns, before, f"{case}: round() changed the values it was given")
    expect(
        values.shape == columns.shape and values.dtype == columns.dtype,
        f"{case}: round() turns {tuple(columns.shape)} {columns.dtype} into {tuple(values.shape)} {values.dtype}.",
    )
    expect(
        codes.shape[:2] == columns.shape[:2],
        f"{case}: round() gives codes {tuple(codes.shape)} for {tuple(columns.shape)}.",
    )
    expect(bool((codes.double() == codes.double().round()).all()), f"{case}: codes of round() are no integers.")
    last = columns.shape[1] - 1
    for position in sorted({0, last // 3, last // 2, last}):
        code, value = grid.round(columns[:, position], position)
        expect_equal(value, values[:, position], f"{case}: column {position} rounded alone and with the others")
        expect_equal(code, codes[:, position], f"{case}: codes of column {position} rounded alone and with the others")
    if isinstance(grid, EntryGrid):
        _check_entries(grid, columns, codes, values, case)
    _, again = grid.round(values.clone(), slice(None))
    expect_same_levels(grid, again, values, f"{case}: a value that round() gave, rounded again")
    return codes, values


def _check_entries(grid: EntryGrid, columns: Tensor, codes: Tensor, values: Tensor, case: str) -> None:
    """See that single weights, from other rows and columns in each head, are rounded as in their columns."""
    heads, width, height = columns.shape
    head, entry = torch.arange(heads)[:, None], torch.arange(height + 1)[None]
    positions, rows = (5 * entry + head + 1) % width, (3 * entry + head) % height
    code, value = grid.round_entries(columns[head, positions, rows], rows, positions)
    expect_equal(value, values[head, positions, rows], f"{case}: round_entries() against round()")
    expect_equal(code, codes[head, positions, rows], f"{case}: codes of round_entries() against round()")


def _check_meaning(
    format: Format, quantized: QuantizedWeight, values: Tensor, option: Option, shape: Shape, case: str
) -> None:
    weight = format.dequantize(quantized, option)
    expect(weight.dtype == torch.float32, f"{case}: dequantize() gives {weight.dtype}, float32 is promised.")
    expect_equal(weight, values.transpose(1, 2).reshape(shape), f"{case}: dequantize() against what round() gave")


def _check_storage(format: Format, quantized: QuantizedWeight, option: Option, shape: Shape, case: str) -> None:
    codes, parameters = quantized.codes.clone(), {name: each.clone() for name, each in quantized.parameters.items()}
    expected = format.dequantize(quantized, option)
    packed = format.pack(quantized, option)
    _check_layout(packed, format.packed_layout(option, shape), case)
    expect_equal(quantized.codes, codes, f"{case}: pack() or dequantize() changed the codes")
    expect_same_tensors(quantized.parameters, parameters, f"{case}: pack() or dequantize() changed the parameters")
    # A fresh copy of the format and tensors that went through a file: nothing may be remembered but what is stored.
    loaded = load_bytes(save_bytes({name: tensor.contiguous() for name, tensor in packed.items()}))
    fresh = copy.deepcopy(format)
    unpacked = fresh.unpack(loaded, option, shape)
    expect_equal(fresh.dequantize(unpacked, option), expected, f"{case}: dequantize() after pack() and unpack()")
    expect_same_tensors(fresh.pack(unpacked, option), packed, f"{case}: pack() after unpack()")
    expect_same_tensors(loaded, packed, f"{case}: unpack() or dequantize() changed the packed tensors")


def _check_stored_grid(
    format: RoundableFormat, quantized: QuantizedWeight, option: Option, shape: Shape, case: str
) -> None:
    """See that the grid of a stored weight rounds it to itself, and binds other codes to the same parameters."""
    weight = format.dequantize(quantized, option)
    stored = format.unpack(format.pack(quantized, option), option, shape)
    grid = format.grid(stored, option)
    codes, values = grid.round(weight.T[None].contiguous(), slice(None))
    expect_equal(values[0].T, weight, f"{case}: a stored weight rounded on its own grid()")
    expect_same_tensors(grid.finish(codes).parameters, stored.parameters, f"{case}: parameters of grid().finish()")
    codes, values = grid.round(values.roll(1, 1).contiguous(), slice(None))
    expect_equal(format.dequantize(grid.finish(codes), option), values[0].T, f"{case}: other weights on grid()")


def _check_rows(format: RowFormat, quantized: QuantizedWeight, option: Option, shape: Shape, case: str) -> None:
    """See that single rows, in another order and one of them twice, are those of the whole weight."""
    rows = torch.arange(shape[0], -1, -1) * 5 % shape[0]
    found = format.unpack_rows(format.pack(quantized, option), option, rows, shape[1])
    whole = format.dequantize(quantized, option)
    expect_equal(format.dequantize(found, option), whole[rows], f"{case}: rows by unpack_rows() against dequantize()")


def _check_layout(
    packed: Mapping[str, Tensor], layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], case: str
) -> None:
    expect(set(packed) == set(layout), f"{case}: pack() gives {sorted(packed)}, packed_layout() says {sorted(layout)}.")
    for name, (shape, dtype) in layout.items():
        tensor = packed[name]
        expect(
            tuple(tensor.shape) == tuple(shape) and tensor.dtype == dtype,
            f"{case}: pack() gives {name} as {tuple(tensor.shape)} {tensor.dtype}, "
            f"packed_layout() says {tuple(shape)} {dtype}.",
        )
        expect(tensor.is_contiguous(), f"{case}: pack() gives {name} not contiguous, which cannot be saved.")
        stored = tensor.untyped_storage().nbytes()
        expect(
            stored <= tensor.numel() * tensor.element_size(),
            f"{case}: {name} is a view into {stored} bytes, {tensor.numel() * tensor.element_size()} of them its own.",
        )


def _check_order(format: Format, grid: Grid, weight: Tensor, option: Option, case: str) -> None:
    """Any order of columns must give the same codes, and ``finish`` must put them back in the natural order."""
    heads, _, width = weight.shape
    generator = torch.Generator().manual_seed(width)
    first, second = (torch.stack([torch.randperm(width, generator=generator) for _ in range(heads)]) for _ in range(2))
    columns = weight.transpose(1, 2)
    natural = format.dequantize(grid.finish(grid.round(columns, slice(None))[0]), option)
    permuted, order = grid, torch.arange(width).expand(heads, -1)
    for step in (first, second):  # the second permutation is of the permuted grid's own positions
        permuted, order = permuted.permuted(step), order.gather(1, step)
        ordered = columns.gather(1, order.unsqueeze(-1).expand_as(columns))
        codes, _ = permuted.round(ordered, slice(None))
        weight_again = format.dequantize(permuted.finish(codes), option)
        expect_equal(weight_again, natural, f"{case}: permuted() grid against the natural order of columns")


def _check_extremes(format: Format, option: Option, shape: Shape) -> None:
    """Weights that are all zero, constant, tiny or hold one large outlier must come back finite."""
    outlier = random_weight(1, shape, seed=1)
    outlier[0, 0, 0] = 100.0
    for what, weight in {
        "all zero": torch.zeros(1, *shape),
        "all 0.02": torch.full((1, *shape), 0.02),
        "all -0.02": torch.full((1, *shape), -0.02),
        "of size 1e-6": random_weight(1, shape, seed=2) * 1e-5,
        "with an outlier of 100": outlier,
    }.items():
        grid = format.fit(weight, option)
        restored = format.dequantize(grid.finish(grid.round(weight.transpose(1, 2), slice(None))[0]), option)
        expect(bool(restored.isfinite().all()), f"{option}, shape {shape}: a weight {what} comes back with NaN or Inf.")
        if what == "all zero":
            expect(
                bool((restored == 0).all()), f"{option}, shape {shape}: a weight {what} comes back as something else."
            )
