"""Ways of choosing the 4-bit weights, at every share of them: rows whose names differ in the percentage alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

_NAME = re.compile(r"(?P<start>[a-z]\w*?)_(?P<share>\d{2,3})(?:_(?P<end>[a-z]\w*))?")
_Result = TypeVar("_Result")


def by_share(rows: Mapping[str, _Result]) -> dict[str, dict[int, _Result]]:
    """Return the results of each way by their percentage, the largest first; ways with a single one are left out.

    ``aptq_75`` is one of ``APTQ``, ``manual_blockwise_75_first`` of ``manual blockwise, first``.
    """
    found: dict[str, dict[int, _Result]] = {}
    for name, result in rows.items():
        if match := _NAME.fullmatch(name):
            label = match["start"].replace("_", " ") + (f", {match['end'].replace('_', ' ')}" if match["end"] else "")
            found.setdefault(label.replace("aptq", "APTQ"), {})[int(match["share"])] = result
    ours_first = sorted(found, key=lambda label: not label.startswith("APTQ"))
    return {label: dict(sorted(found[label].items(), reverse=True)) for label in ours_first if len(found[label]) > 1}
