"""LO-BCQ for activations: blocks of inputs, each coded by the one of a few codebooks that serves it best."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from aptq.activations.tokens import check_groups, joined, split, token_scale
from aptq.api import AptqError
from aptq.formats.block_clusters import TOP, Codebooks, check_counts, frozen_entries, look_up

_LEVELS = 16


@dataclass(frozen=True)
class BlockClustered:
    """``x = C_c[code] * scale``: ``group_size`` inputs of a token share a scale, ``block_size`` of them a codebook.

    Codes have 4 bits. The ``num_codebooks`` codebooks are frozen, designed once for what a language model's layers are
    called with; a block takes the one with the least squared error. Scales are such that the largest magnitude of a
    group is 31, the largest entry.

    Source: Elangovan et al., "LO-BCQ" (arXiv 2502.05376); see ``aptq.formats.block_clusters``.
    """

    group_size: int = 64
    block_size: int = 8
    num_codebooks: int = 8
    scale_dtype: str = "e4m3"

    def __post_init__(self) -> None:
        check_groups(self.group_size, self.scale_dtype)
        check_counts("activation", self.block_size, self.num_codebooks)
        if self.group_size != -1 and self.group_size % self.block_size:
            raise AptqError(
                f"activation.group_size={self.group_size} is no whole number of blocks of "
                f"activation.block_size={self.block_size}; use a multiple of it, or -1."
            )

    def check(self, in_features: int) -> None:
        """Serve every width: a last block that is shorter is filled up with zeros."""

    def quantize(self, x: Tensor) -> Tensor:
        """Return the nearest entries to ``x [..., in]``; see ``aptq.api.ActivationQuantizer``."""
        if x.numel() == 0:
            return x.clone()
        size = -(-x.shape[-1] // self.block_size) * self.block_size if self.group_size == -1 else self.group_size
        groups = split(x, size)
        largest = groups.abs().amax(-1, keepdim=True)
        scale = token_scale(largest.squeeze(-1), float(TOP), self.scale_dtype)[..., None]
        blocks = (groups / scale).unflatten(-1, (-1, self.block_size))
        books = Codebooks.of(frozen_entries("activations", self.num_codebooks, _LEVELS).to(blocks))
        chosen, _ = books.choose(blocks)
        entries = look_up(books.nearest.flatten(), books.places(blocks, chosen[..., None]))
        return joined(entries.flatten(-2).mul_(scale * (largest != 0)), x)  # 0 need not be an entry
