"""Random blocks and codebooks, and what codebooks make of blocks by definition."""

import torch
from torch import Tensor

from aptq.formats.block_clusters import TOP


def random_blocks(number: int, seed: int, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(number, 1, generator=generator, dtype=torch.float64) * 12
    return (torch.randn(number, size, generator=generator, dtype=torch.float64) * spread).clamp(-TOP, TOP)


def random_books(count: int, levels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(2 * TOP + 1, generator=generator)[:levels].sort().values - TOP for _ in range(count)]
    return torch.stack(rows).double()


def squares(blocks: Tensor, books: Tensor) -> Tensor:
    """Return the squared error of every scalar by every codebook, ``[count, n, size]``, from the definition."""
    return (blocks[None, ..., None] - books[:, None, None]).square().amin(-1)
