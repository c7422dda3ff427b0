"""Teach transformers to load our checkpoints, whichever of the two is imported first.

``transformers`` has no entry points for quantization methods. A line in ``aptq_autoload.pth`` imports this module
when Python starts; it leaves a finder that waits for ``transformers.quantizers.auto`` and registers right after that
module was executed. Until then nothing heavy is imported: this module costs every Python start only itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

_AWAITED = "transformers.quantizers.auto"


class _RegisteringLoader(SourceFileLoader):
    """Execute the awaited module, then register with it."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _register()


class _Finder:
    """Find the awaited module where it is found anyway, and put our loader in its spec; then step back."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _RegisteringLoader(spec.loader.name, spec.loader.path)
        return spec


def _register() -> None:
    """Register; a broken installation of ours must not break the import of transformers."""
    try:
        import_module("aptq.hf")  # registers; its imports, torch above all, transformers has made by now
    except Exception as error:
        import logging

        logging.getLogger(__name__).warning("aptq checkpoints cannot be loaded in this process: %s", error)


def install() -> None:
    """Register now if transformers' quantizers are loaded, else when they are; calling it again does nothing."""
    if _AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
