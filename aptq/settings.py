"""The fixed sections of a config, as typed data; components have dataclasses of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What is quantized."""

    path: str  # a folder or a hub id; "smollm2" with the extra `demo` is the embedded model
    gguf_file: str | None = None
    revision: str | None = None
    dtype: str = "auto"  # auto (as stored) | float32 | bfloat16 | float16
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    quantize_head: bool = False
    quantize_embeddings: int | None = None  # bits of the input embedding, and of a head that is tied to it; null: none
    embedding_group_size: int = 64  # of its scales and zero points; -1: one a row
    skip: list[str] = field(default_factory=list)  # layers left in full precision: glob patterns of full names


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Text to calibrate on and to judge by."""

    source: str  # pydoc | text | hub
    num_samples: int = 128
    sequence_length: int = 2048
    batch_size: int = 1
    seed: int = 0
    path: Any = None  # text: file, glob or list of them
    evaluation_path: Any = None  # text: file, glob, list of them, or {name: file}
    text_field: str = "text"
    hub: dict[str, Any] = field(default_factory=dict)  # hub: {path, name, split, data_files, streaming} for datasets
    evaluation_hub: dict[str, dict[str, Any]] = field(default_factory=dict)  # hub: {name: the same}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where results go."""

    dir: str
    overwrite: bool = False
    keep_blocks: bool = False
