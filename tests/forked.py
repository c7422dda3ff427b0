"""``python -m aptq`` in a copy of a process that has imported libraries and nothing of ours: see test_cli.py.

``runpy`` runs this file with ``given``: the arguments, the folder, the environment, and files for what is said.
"""

from __future__ import annotations

import os
import runpy
import sys

arguments, folder, environment, *said = globals()["given"]
os.chdir(folder)
os.environ.clear()
os.environ.update(environment)
for stream, path in enumerate(said, start=1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
sys.argv[:] = ["aptq", *arguments]
runpy.run_module("aptq", run_name="__main__", alter_sys=True)
