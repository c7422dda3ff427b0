"""Floating-point levels, one scale for the negative and one for the positive weights of a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aptq.formats.levels import LevelFormat


@dataclass(frozen=True)
class AsymmetricFloat(LevelFormat):
    """``w = level[code] * scale``, with ``scales_below`` for levels below 0 and ``scales`` for those above.

    A scale and a zero point would shift the levels away from where they are wanted; two scales leave 0 where it is, and
    store as much. A group that has no weight on one side has one scale for both. Options as in ``float``; with
    ``clip_steps`` each side's range is searched by itself.

    Source: Zhang et al., "AFPQ: Asymmetric Floating Point Quantization for LLMs" (ACL Findings 2024, arXiv 2311.01792),
    section 3; the search is ours (there: none).
    """

    asymmetric: ClassVar[bool] = True
