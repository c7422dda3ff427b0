"""Figures as a reader wants them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def size(count: float) -> str:
    """Spell bytes: 70.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Spell seconds: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def figure(value: float | None) -> str:
    """Spell a figure to four places that count; None is one that was not finite."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.4f}"
    return f"{value:.2e}"


def measured(value: float | None, error: float | None) -> str:
    """Spell a figure with its standard error, where there is one."""
    return figure(value) if value is None or error is None else f"{value:.4f} ± {error:.4f}"


def difference(before: float | None, after: float | None) -> str:
    """Spell by how much a figure went up or down, or nothing where there is none to tell."""
    return "" if before is None or after is None else f"{after - before:+.4f}"


def change(before: float | None, after: float | None) -> str:
    """Spell the change of a figure in percent, or nothing where there is none to tell."""
    if before is None or after is None or before == 0:
        return ""
    return f"{(after - before) / abs(before):+.1%}"


def share(part: float) -> str:
    """Spell a share in percent."""
    return f"{part:.0%}"


def origin(budget: Mapping[str, Any]) -> str:
    """Spell where a plan came from and what it takes on average (``Plan.budget``)."""
    told = []
    allocator = budget.get("allocator")
    if isinstance(allocator, Mapping):
        rest = {key: value for key, value in allocator.items() if key != "name" and value not in (None, [], {})}
        told.append(f"Chosen by {allocator.get('name')}: " + ", ".join(f"{key} {_plain(rest[key])}" for key in rest))
    if "plan" in budget:
        told.append(f"Given: {budget['plan']}")
    if "audit" in budget:
        told.append(f"Changed by the audit: {budget['audit']}")
    bits = [
        f"{budget[key]:.3f} {words}" for key, words in _AVERAGES.items() if isinstance(budget.get(key), int | float)
    ]
    if isinstance(milliseconds := budget.get("decode_milliseconds"), int | float):
        told.append(f"Predicted to take {milliseconds:.3g} ms a token in the quantized layers")
    told += [f"On average {' and '.join(bits)} a weight"] if bits else []
    if isinstance(embedding := budget.get("embedding"), Mapping):
        told.append(f"The embedding, beside them, has {embedding.get('bits')} bits of code a weight")
    return "".join(f"{sentence}. " for sentence in told).strip()


_AVERAGES = {"code_bits": "bits of code", "storage_bits": "stored bits"}


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={item}" for key, item in value.items())
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
