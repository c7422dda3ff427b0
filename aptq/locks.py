"""Processes that share a folder take turns."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_log = logging.getLogger(__name__)


@contextmanager
def turn(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file; wait for another process that holds it, however it ends.

    On Windows, and on a file system without locks, nobody waits: going on beats refusing.

    Args:
        path: of the lock file, whose folder may be missing.
        what: the other process is at, for the log.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.info("Another process is %s; waiting for what it finds.", what)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                _log.debug("%s: no locks here", path)
        yield
