"""What metrics that run the model backwards have in common."""

from __future__ import annotations

from aptq.api import AptqError

_LABELS = ("both", "model", "data")


def check_run(samples: int, labels: str) -> None:
    """Raise ``AptqError`` for no samples, or labels that are not known."""
    if samples < 1:
        raise AptqError(f"metric.samples={samples} is not allowed; use 1 or more.")
    if labels not in _LABELS:
        raise AptqError(f"metric.labels={labels!r} is not known; use one of {', '.join(_LABELS)}.")
