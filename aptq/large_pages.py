"""Memory for weights that are read from end to end for every token."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

_ALIGNED = 64  # bytes: a line of the cache


class LargePages:
    """Memory on the CPU that its tensors share, in pages of 2 MiB where the system has them.

    A model is more pages of 4 KiB than a CPU can remember the places of: looking them up took a fifth of the time of
    reading 80 MB of weights. Pages become resident as they are written.

    Args:
        sizes: in bytes, of the tensors that there has to be room for.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        self._room = _reserve(sum(map(_rounded, sizes)))
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a contiguous tensor of the same values in this memory, which lives as long as any tensor in it."""
        place = self._room[self._used : self._used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._used += _rounded(tensor.nbytes)
        return place.copy_(tensor)


def _rounded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _reserve(size: int) -> Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
