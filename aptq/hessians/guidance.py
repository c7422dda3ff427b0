"""The loss's gradients that the engine left with a block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from aptq.api import AptqError, Block
from aptq.models.structure import has_experts


def guidance_of(block: Block, names: Iterable[str]) -> Mapping[str, Tensor]:
    """Return the mean squares of gradients at some modules; raise ``AptqError`` where the engine has taken none."""
    wanted = list(names)
    missing = [name for name in wanted if name not in block.guidance]
    if missing:
        raise AptqError(f"The loss's gradients at {missing[0]} are not known: they have to be taken before any pass.")
    return {name: block.guidance[name] for name in wanted}


def refuse_experts(block: Block) -> None:
    """Raise ``AptqError`` for a mixture of experts."""
    if has_experts(block.module):
        raise AptqError(
            f"{block.name} is a mixture of experts, whose layers see a part of the tokens each; the loss's gradients "
            "are taken for all tokens. Use hessian=input or hessian=attention."
        )
