"""The native checkpoint: packed tensors that transformers loads through ``aptq.hf``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from aptq.api import AptqError, ExportJob, Format, Option
from aptq.exporters.folder import FolderExporter, write_folder
from aptq.hf_config import AptqConfig
from aptq.shards import DTYPES, TensorInfo


@dataclass(frozen=True)
class Native(FolderExporter):
    """Write ``config.json``, safetensors, tokenizer and generation config; any format, any mix of options.

    ``{layer}.{packed name}`` is the name of a packed tensor; all others keep their name in the model. Tensors are
    streamed: one is in memory at a time. A file is at most ``max_shard_size`` ("4GB", or bytes), as far as single
    tensors allow.
    """

    @property
    def stores_activations(self) -> bool:
        """Yes: the packed layers of a loaded model quantize their inputs."""
        return True

    @property
    def stores_transforms(self) -> bool:
        """Yes: the packed layers of a loaded model change the basis of their inputs."""
        return True

    @property
    def stores_embeddings(self) -> bool:
        """Yes: a loaded model looks rows up in the packed table."""
        return True

    def check(
        self,
        format: Format,
        format_name: str,
        options: Sequence[Option],
        *,
        shapes: Mapping[str, tuple[int, int]],
        config: Any,
    ) -> None:
        """Raise ``AptqError`` when a tensor of the format has a dtype that safetensors cannot hold."""
        del shapes, config
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
        quantization = AptqConfig.from_plan(
            job.plan, job.format_config, job.provenance, job.activation_config, job.transform_config, job.embedding
        )
        infos = (TensorInfo.of(name, tensor) for name, tensor in _tensors(job))
        write_folder(job, folder, infos, _tensors(job), quantization, self.max_shard_size)


def _tensors(job: ExportJob) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the checkpoint; twice the same when called twice."""
    for layer in (*job.plan, *(() if job.embedding is None else (job.embedding.name,))):
        for name, tensor in job.packed(layer).items():
            yield f"{layer}.{name}", tensor
    yield from job.full_precision()
