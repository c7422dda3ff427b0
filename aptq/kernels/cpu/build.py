"""Build the C++ kernels with the system's compiler, once for a user, a compiler and a CPU."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from aptq.errors import AptqError

COMPILERS = ("c++", "g++", "clang++")
HERE = "native"
ARCHITECTURES = (HERE, "x86-64-v3", "x86-64-v4")
"""What the compiler may use: all that this CPU has; AVX2; AVX-512 without VNNI."""

_SOURCE = Path(__file__).with_name("source")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
_NEEDED = ("__AVX2__", "__FMA__", "__F16C__")
_log = logging.getLogger(__name__)


@cache
def build(architecture: str, folder: str) -> Path:
    """Return the shared library of the kernels, built unless ``folder`` has it.

    It is written under a name of its own and then renamed: processes that build at once each end with a whole file.

    Args:
        architecture: one of ``ARCHITECTURES``.
        folder: where builds are kept, by source, compiler and CPU; ``~`` is the user's home.

    Raises:
        AptqError: there is no compiler, the CPU has no AVX2, or the compiler or the file system fails; why is said.
    """
    compiler = _compiler()
    macros = _macros(compiler, architecture)
    _check_cpu(compiler, architecture, macros)
    path = Path(folder).expanduser() / f"cpu-{_key(architecture, macros)}.so"
    if path.is_file():
        return path
    _log.info("Building the CPU kernels with %s; this is done once.", compiler)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AptqError(f"the kernels cannot be kept in {path.parent}: {error.strerror}") from error
    draft = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    command = [compiler, *_FLAGS, f"-march={architecture}", str(_SOURCE / "kernels.cpp"), "-o", str(draft)]
    try:
        _run(command)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def _compiler() -> str:
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise AptqError(f"no C++ compiler is on the PATH ({', '.join(COMPILERS)}); install one, such as g++")
    return found


def _macros(compiler: str, architecture: str) -> str:
    """Return what the compiler predefines: its version, and what the CPU can do."""
    return _run([compiler, f"-march={architecture}", "-pthread", "-dM", "-E", "-x", "c++", os.devnull])


def _check_cpu(compiler: str, architecture: str, macros: str) -> None:
    """Raise where the code could not run: this CPU, as the compiler sees it, lacks an instruction set."""
    lost = [name for name in _NEEDED if name not in _defined(macros)]
    if lost:
        raise AptqError(f"the CPU lacks {', '.join(name.strip('_') for name in lost)}")
    if architecture != HERE:
        here = _defined(_macros(compiler, HERE))
        vectors = {name for name in _defined(macros) if name.startswith(("__AVX", "__FMA", "__F16C"))}
        if not vectors <= here:
            lost = sorted(name.strip("_") for name in vectors - here)
            raise AptqError(f"the CPU lacks {', '.join(lost)}, which architecture={architecture} uses")


def _defined(macros: str) -> set[str]:
    return {line.split()[1] for line in macros.splitlines() if line.startswith("#define ")}


def _key(architecture: str, macros: str) -> str:
    """Name a build by all that it depends on."""
    digest = hashlib.sha256()
    for part in (sys.platform, architecture, " ".join(_FLAGS), *sorted(macros.splitlines())):
        digest.update(part.encode() + b"\0")
    for path in sorted(_SOURCE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    except OSError as error:
        raise AptqError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise AptqError(f"{command[0]} failed: {lines[0].strip() if lines else f'exit status {done.returncode}'}")
    return done.stdout
