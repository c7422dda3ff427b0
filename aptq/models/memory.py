"""Freed memory, given back."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def trim() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    Tensors of some megabytes come and go with every block. glibc keeps what is freed between smaller living objects,
    and the process grows by about half a block each time; a trim takes milliseconds.
    """
    with suppress(AttributeError, OSError, TypeError):  # other C libraries have no malloc_trim and need none
        ctypes.CDLL(None).malloc_trim(0)
