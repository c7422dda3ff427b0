"""What metrics that run the model backwards have in common."""

from __future__ import annotations

from collections.abc import Sequence

from aptq.api import AptqError


def check_run(samples: int, labels: str, known: Sequence[str]) -> None:
    """Raise ``AptqError`` for no samples, or labels that are not among those known."""
    if samples < 1:
        raise AptqError(f"metric.samples={samples} is not allowed; use 1 or more.")
    if labels not in known:
        raise AptqError(f"metric.labels={labels!r} is not known; use one of {', '.join(known)}.")
