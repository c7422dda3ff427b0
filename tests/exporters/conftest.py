"""A finished run of a tiny model, for exporters to write down."""

from collections.abc import Callable
from pathlib import Path

import pytest

import aptq


@pytest.fixture
def quantized(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., aptq.Run]:
    """Return ``make(*overrides, **config) -> Run`` of a tiny LLaMA; its text is ``tmp_path / "text.txt"``."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i}. The quick brown fox jumps over the lazy dog." for i in range(200)))

    def make(*more: str, **config: object) -> aptq.Run:
        return aptq.quantize(
            [
                *(f"model.path={tiny_model_folder('llama', **config)}", "data=text", f"data.path={text}"),
                *(f"data.evaluation_path={{fox: {text}}}", "data.num_samples=2", "data.sequence_length=64"),
                *("evaluator=none", "fabric=cpu", "callback=none", f"cache_dir={tmp_path / 'cache'}"),
                *(f"run.dir={tmp_path / 'run'}", *more),
            ]
        )

    return make
