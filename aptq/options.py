"""The options in play: every width, at every group size, in every format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from aptq.api import Format, FormatSet, Option


def formats_by_name(format: Format, name: str) -> Mapping[str, Format]:
    """Return every format that a layer may be stored in, by the name that its options have."""
    return format.formats if isinstance(format, FormatSet) else {name: format}


def offered(formats: Mapping[str, Format], bits: Iterable[int], group_sizes: Sequence[int] = ()) -> list[Option]:
    """Return all options, whether a format has them or not; without group sizes each format's own."""
    return [
        Option(width, size, name)
        for width in bits
        for name, format in formats.items()
        for size in group_sizes or (format.group_size,)
    ]
