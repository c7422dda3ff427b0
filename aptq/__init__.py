"""Training-free mixed-precision quantization of large language models.

Importing this package imports neither torch nor transformers; names are loaded when they are used. It does make
``transformers`` able to load our checkpoints (see ``aptq._autoload``).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aptq import _autoload

if TYPE_CHECKING:
    from aptq.config import compose as compose
    from aptq.decoding import Decoder as Decoder
    from aptq.experiment import quantize as quantize
    from aptq.hf import load as load
    from aptq.run import Run as Run

    __version__: str

__all__ = ["Decoder", "Run", "__version__", "compose", "load", "quantize"]

_HOMES = {
    "Decoder": "aptq.decoding",
    "Run": "aptq.run",
    "compose": "aptq.config",
    "load": "aptq.hf",
    "quantize": "aptq.experiment",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("aptq")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_autoload.install()
