"""What all checks share: seeded tensors and assertions that say what differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from aptq.api import EntryGrid, Format, FormatSet, Grid, Option
from aptq.errors import AptqError
from aptq.registry import build

Shape = tuple[int, int]


def expect(condition: bool, message: str) -> None:
    """Raise ``AssertionError`` with a message unless the condition holds (also under ``python -O``)."""
    if not condition:
        raise AssertionError(message)


def expect_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Demand equal shape, dtype and bits (NaN equals nothing)."""
    expect(actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}.")
    expect(actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}.")
    different = actual != expected
    if bool(different.any()):
        where = tuple(int(index) for index in different.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(different.sum())} of {actual.numel()} values differ, "
            f"first at {where}: {actual[where].item()!r}, expected {expected[where].item()!r}."
        )


def expect_same_levels(grid: Grid, actual: Tensor, expected: Tensor, what: str) -> None:
    """Demand that values which a grid gave, rounded again on it, are equal.

    Centroids of vectors may be so near to each other that rounding decides which is nearest: there, almost equal.
    """
    if not isinstance(grid, EntryGrid):
        near = torch.isclose(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        actual = torch.where(near, expected, actual)
    expect_equal(actual, expected, what)


def expect_same_tensors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Demand the same names and, of each, equal bits."""
    expect(set(actual) == set(expected), f"{what}: tensors {sorted(actual)}, expected {sorted(expected)}.")
    for name, tensor in expected.items():
        expect_equal(actual[name], tensor, f"{what}: {name}")


def default_format() -> Format:
    """Return the built-in integer format, to try other components with."""
    built: Format = build("format", {"name": "integer"})
    return built


def accepts(format: Format, option: Option, shape: Shape) -> bool:
    """Ask a format whether it can store a layer so; anything but ``AptqError`` is a failure of its ``check``."""
    try:
        format.check(option, shape)
    except AptqError:
        return False
    return True


def accepts_heads(format: Format, option: Option, shape: Shape, heads: int) -> bool:
    """Ask a format whether it can code a layer of several heads, each by itself; one head it has to."""
    try:
        format.fit(random_weight(heads, shape, seed=0), option)
    except AptqError:
        expect(heads > 1, f"fit() refuses a layer that check() accepts: {option}, shape {shape}.")
        return False
    return True


def accepted(
    format: Format, bits: Sequence[int], group_sizes: Sequence[int], shapes: Sequence[Shape]
) -> list[tuple[Option, Shape]]:
    """Return all options and shapes that a format accepts; each width must be accepted somewhere."""
    cases = []
    for width in bits:
        options = [
            Option(width, size, name)
            for name in (format.formats if isinstance(format, FormatSet) else ("",))
            for size in dict.fromkeys((*group_sizes, format.group_size, -1))
        ]
        found = [(option, shape) for option in options for shape in shapes if accepts(format, option, shape)]
        expect(
            bool(found),
            f"The format accepts {width} bits with none of {options} and none of the shapes {list(shapes)}.",
        )
        cases += found
    return cases


def random_weight(heads: int, shape: Shape, seed: int) -> Tensor:
    """Return a seeded weight ``[heads, rows, in]`` with a few outliers, as trained ones have them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(heads, shape[0] // heads, shape[1], generator=generator) * 0.05
    weight[:, :, seed % shape[1]] *= 4
    return weight


def random_curvature(heads: int, width: int, seed: int, rank: int | None = None) -> Tensor:
    """Return seeded column Hessians ``[heads, width, width]`` of correlated inputs; of low rank when asked for."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(heads, rank or 2 * width, width, generator=generator)
    mixing = torch.eye(width) + 0.5 * torch.randn(width, width, generator=generator) / width**0.5
    inputs = inputs @ mixing
    hessian: Tensor = 2 * inputs.transpose(1, 2) @ inputs / inputs.shape[1]
    return (hessian + hessian.transpose(1, 2)) / 2


def accepted_widths(check: Callable[[int], None], widths: Sequence[int]) -> list[int]:
    """Return the widths of inputs that ``check`` does not refuse; one must be among them."""
    accepted = []
    for width in widths:
        with suppress(AptqError):
            check(width)
            accepted.append(width)
    expect(bool(accepted), f"check() refuses every width that was tried: {list(widths)}.")
    return accepted
