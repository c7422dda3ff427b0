"""Callbacks: what happens at the events of a run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from aptq.api import Callback, LayerReport
from aptq.errors import AptqError

__all__ = ["Callbacks"]

_HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class Callbacks(Callback):
    """Calls the hooks of many callbacks, in order.

    As a context manager it closes those that have a ``close`` method, however the run ends.

    Raises:
        AptqError: a callback has an ``on_...`` method that is no hook, or a hook that cannot be called as one; found
            out here, not hours into a run.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        for callback in callbacks:
            _check(callback)
        self.callbacks = tuple(callbacks)

    def __enter__(self) -> Callbacks:
        """Return the callbacks themselves."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close every callback, also when closing one fails."""
        with ExitStack() as stack:
            for callback in self.callbacks:
                close = getattr(callback, "close", None)
                if callable(close):
                    stack.callback(close)

    def on_run_start(self, *, folder: Path, config: Mapping[str, Any]) -> None:
        """Tell all that a run begins."""
        self._call("on_run_start", folder=folder, config=config)

    def on_stage_start(self, *, stage: str, total: int, unit: str) -> None:
        """Tell all that a stage begins."""
        self._call("on_stage_start", stage=stage, total=total, unit=unit)

    def on_advance(self, *, stage: str, done: float, detail: str) -> None:
        """Tell all how far the stage is."""
        self._call("on_advance", stage=stage, done=done, detail=detail)

    def on_layer_end(self, *, stage: str, report: LayerReport) -> None:
        """Tell all that a layer was quantized."""
        self._call("on_layer_end", stage=stage, report=report)

    def on_block_end(self, *, stage: str, index: int, metrics: Mapping[str, float]) -> None:
        """Tell all that a block is finished."""
        self._call("on_block_end", stage=stage, index=index, metrics=metrics)

    def on_stage_end(self, *, stage: str, seconds: float) -> None:
        """Tell all that a stage is over."""
        self._call("on_stage_end", stage=stage, seconds=seconds)

    def on_run_end(self, *, folder: Path, metrics: Mapping[str, Any]) -> None:
        """Tell all that the run is over."""
        self._call("on_run_end", folder=folder, metrics=metrics)

    def _call(self, hook: str, **event: Any) -> None:
        for callback in self.callbacks:
            method = getattr(callback, hook, None)  # a callback need not inherit from Callback
            if method is not None:
                method(**event)


def _check(callback: object) -> None:
    kind = type(callback).__name__
    found = [name for name in dir(callback) if name.startswith("on_") and callable(getattr(callback, name))]
    if not found:
        raise AptqError(f"{kind} is no callback: it has none of the hooks {', '.join(_HOOKS)}.")
    for name in found:
        if name not in _HOOKS:
            near = get_close_matches(name, _HOOKS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise AptqError(f"The callback {kind} has a method {name!r}, which is no hook.{hint} Hooks: {_HOOKS}.")
        keywords = [key for key in inspect.signature(getattr(Callback, name)).parameters if key != "self"]
        try:
            inspect.signature(getattr(callback, name)).bind(**dict.fromkeys(keywords))
        except TypeError as error:
            raise AptqError(
                f"The hook {name!r} of the callback {kind} cannot be called with the keywords {', '.join(keywords)}: "
                f"{error}."
            ) from None
