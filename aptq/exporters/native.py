"""The native checkpoint: packed tensors that transformers loads through ``aptq.hf``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from aptq.api import AptqError, ExportJob, Format, Option
from aptq.hf import AptqConfig
from aptq.shards import DTYPES, TensorInfo, explain_full_disk, parse_size, plan_shards, sync_folder, write_shards


@dataclass(frozen=True)
class Native:
    """Write ``config.json``, safetensors, tokenizer and generation config; any format, any mix of options.

    ``{layer}.{packed name}`` is the name of a packed tensor; all others keep their name in the model. Tensors are
    streamed: one is in memory at a time. A file is at most ``max_shard_size`` ("4GB", or bytes), as far as single
    tensors allow.
    """

    max_shard_size: str | int = "4GB"

    def __post_init__(self) -> None:
        """Raise ``AptqError`` when the shard size is none."""
        parse_size(self.max_shard_size)

    def check(self, format: Format, format_name: str, options: Sequence[Option]) -> None:
        """Raise ``AptqError`` when a tensor of the format has a dtype that safetensors cannot hold."""
        for option in options:
            width = max(32, option.group_size)
            for name, (_, dtype) in format.packed_layout(option, (32, width)).items():
                if dtype not in DTYPES:
                    raise AptqError(
                        f"Format {format_name} packs {name} as {dtype}, which safetensors cannot hold; "
                        f"it can hold {', '.join(str(known).removeprefix('torch.') for known in DTYPES)}."
                    )

    def export(self, job: ExportJob, folder: Path) -> None:
        """Write a model folder (see the class).

        Raises:
            AptqError: when the disk is too small, before or while writing.
        """
        folder.mkdir(parents=True, exist_ok=True)
        infos = (TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in _tensors(job))
        shards = plan_shards(infos, parse_size(self.max_shard_size))
        config = copy.deepcopy(job.config)
        config.quantization_config = AptqConfig.from_plan(job.plan, job.format_config, job.provenance)
        with explain_full_disk(folder, sum(shard.nbytes for shard in shards)):
            write_shards(folder, shards, _tensors(job))
            config.save_pretrained(folder)
            if job.generation_config is not None:
                job.generation_config.save_pretrained(folder)
            if job.tokenizer is not None:
                job.tokenizer.save_pretrained(folder)
            sync_folder(folder)


def _tensors(job: ExportJob) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the checkpoint; twice the same when called twice."""
    for layer in job.plan:
        for name, tensor in job.packed(layer).items():
            yield f"{layer}.{name}", tensor
    yield from job.full_precision()
