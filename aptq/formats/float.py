"""Floating-point levels, one scale per group of inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aptq.formats.levels import LevelFormat


@dataclass(frozen=True)
class Float(LevelFormat):
    """``w = level[code] * scale``: levels lie closer where weights are more frequent.

    ``code="normal"``: the quantiles of a normal distribution (NF2, NF3, NF4); ``code="fp"``: floating-point numbers
    (FP3 e2m0, FP4 e2m1). Scales are rounded to ``scale_dtype`` *before* codes are chosen. ``clip_steps`` > 0 searches,
    per group, that many smaller ranges (down to ``clip_min`` of the full one) for the least rounding error, each column
    weighed by the curvature's diagonal where there is one.

    Source: Dettmers et al., "QLoRA" (NeurIPS 2023); the symmetric formats of Zhang et al., "AFPQ" (ACL Findings 2024,
    arXiv 2311.01792).
    """

    asymmetric: ClassVar[bool] = False
