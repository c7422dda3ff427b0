"""Figures as a reader wants them."""

from __future__ import annotations

import math


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


def change(before: float | None, after: float | None) -> str:
    """Spell the change of a figure in percent, or nothing where there is none to tell."""
    if before is None or after is None or before == 0:
        return ""
    return f"{(after - before) / abs(before):+.1%}"


def share(part: float) -> str:
    """Spell a share in percent."""
    return f"{part:.0%}"
