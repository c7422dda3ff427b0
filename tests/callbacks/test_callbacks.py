"""The dispatcher: every hook reaches every callback, and misspelt hooks are found out at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from aptq.api import Callback, LayerReport
from aptq.callbacks import Callbacks
from aptq.errors import AptqError


class Recorder(Callback):
    """Writes down two of the hooks."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def on_advance(self, *, stage: str, done: float, detail: str) -> None:
        self.seen.append(f"{stage} {done} {detail}")

    def on_run_end(self, *, folder: Path, metrics: Mapping[str, Any]) -> None:
        self.seen.append(f"end {folder} {dict(metrics)}")

    def close(self) -> None:
        self.seen.append("closed")


class Stranger:
    """Inherits nothing and takes what comes."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def on_advance(self, **event: Any) -> None:
        self.seen.append(f"stranger {event['done']}")


REPORT = LayerReport(
    name="a", out_features=8, in_features=4, bits=3, group_size=-1, format="integer",
    storage_bits=3.1, tokens=9, trace=0.1,
    predicted_cost=None, error_nearest=0.3, error=0.2, relative_error=0.1, damping=0.0, seconds=0.5, events="",
)  # fmt: skip
EVENTS: dict[str, dict[str, Any]] = {
    "on_run_start": {"folder": Path("x"), "config": {}},
    "on_stage_start": {"stage": "quantize", "total": 3, "unit": "block"},
    "on_advance": {"stage": "quantize", "done": 1.0, "detail": "layer a"},
    "on_layer_end": {"stage": "quantize", "report": REPORT},
    "on_block_end": {"stage": "quantize", "index": 0, "metrics": {}},
    "on_stage_end": {"stage": "quantize", "seconds": 1.0},
    "on_run_end": {"folder": Path("x"), "metrics": {"a": 1}},
}


def test_every_hook_reaches_every_callback_in_order() -> None:
    seen: list[str] = []
    callbacks = Callbacks([Recorder(seen), Stranger(seen)])  # type: ignore[list-item]
    for hook, event in EVENTS.items():
        getattr(callbacks, hook)(**event)
    assert seen == ["quantize 1.0 layer a", "stranger 1.0", "end x {'a': 1}"]


def test_all_hooks_of_the_contract_are_dispatched() -> None:
    assert set(EVENTS) == {name for name in vars(Callback) if name.startswith("on_")}
    assert all(name in vars(Callbacks) for name in EVENTS)


def test_callbacks_are_closed_however_a_run_ends() -> None:
    class Broken(Callback):
        def close(self) -> None:
            raise RuntimeError("cannot close")

    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt), Callbacks([Recorder(seen), Stranger(seen)]):  # type: ignore[list-item]
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="cannot close"), Callbacks([Recorder(seen), Broken(), Recorder(seen)]):
        pass
    assert seen == ["closed"] * 3


def test_a_misspelt_hook_is_refused_with_the_nearest() -> None:
    class Misspelt(Callback):
        def on_blok_end(self, *, stage: str, index: int) -> None: ...

    with pytest.raises(AptqError, match=r"Misspelt has a method 'on_blok_end'.*Did you mean 'on_block_end'"):
        Callbacks([Misspelt()])


def test_a_hook_with_other_arguments_is_refused_before_the_run() -> None:
    class Narrow(Callback):
        def on_stage_end(self, *, stage: str) -> None: ...  # type: ignore[override]

    with pytest.raises(AptqError, match=r"'on_stage_end' of the callback Narrow .* stage, seconds"):
        Callbacks([Narrow()])


def test_an_object_without_hooks_is_refused() -> None:
    with pytest.raises(AptqError, match="str is no callback"):
        Callbacks(["progress"])  # type: ignore[list-item]
