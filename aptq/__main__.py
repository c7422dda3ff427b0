"""``python -m aptq`` is ``aptq``."""

from aptq.cli import main

main()
