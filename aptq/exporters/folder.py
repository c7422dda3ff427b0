"""A model folder as transformers reads it: shards, config, generation config, tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aptq.api import AptqError, ExportJob
from aptq.shards import TensorInfo, explain_full_disk, parse_size, plan_shards, sync_folder, write_shards


@dataclass(frozen=True)
class FolderExporter:
    """What exporters of model folders share: a file is at most ``max_shard_size`` ("4GB", or bytes)."""

    max_shard_size: str | int = "4GB"

    def __post_init__(self) -> None:
        """Raise ``AptqError`` when the shard size is none."""
        parse_size(self.max_shard_size)


def model_dtype(config: Any) -> torch.dtype:
    """Return the dtype of a model by its config."""
    dtype: torch.dtype | None = config.dtype
    return torch.float32 if dtype is None else dtype


def check_linear(exporter: str, shapes: Mapping[str, tuple[int, int]], config: Any) -> None:
    """Raise ``AptqError`` for mixtures of experts and ``Conv1D``, for which a reader's layout has no place."""
    experts = next((name for name in shapes if ".experts." in name), None)
    if experts is not None or config.model_type == "gpt2":
        raise AptqError(
            f"exporter={exporter} writes Linear layers only, not {experts or 'Conv1D'}; use exporter=native."
        )


def write_folder(
    job: ExportJob,
    folder: Path,
    infos: Iterable[TensorInfo],
    tensors: Iterable[tuple[str, Tensor]],
    quantization: Any,
    max_shard_size: str | int,
) -> None:
    """Write a model folder, one tensor in memory at a time.

    Args:
        job: where config, generation config and tokenizer are from.
        folder: to write into.
        infos: of every tensor of the checkpoint, in order.
        tensors: the same by name; taken when all is planned.
        quantization: ``config.json``'s ``quantization_config``.
        max_shard_size: "4GB", or bytes.

    Raises:
        AptqError: when the disk is too small, before or while writing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = plan_shards(infos, parse_size(max_shard_size))
    config = copy.deepcopy(job.config)
    config.quantization_config = quantization
    with explain_full_disk(folder, sum(shard.nbytes for shard in shards)):
        write_shards(folder, shards, tensors)
        config.save_pretrained(folder)
        if job.generation_config is not None:
            job.generation_config.save_pretrained(folder)
        if job.tokenizer is not None:
            job.tokenizer.save_pretrained(folder)
        sync_folder(folder)
