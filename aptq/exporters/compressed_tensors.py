"""The ``pack-quantized`` format of compressed-tensors: what transformers, vLLM and SGLang read without aptq."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aptq import packing
from aptq.api import AptqError, ExportJob, Format, Option
from aptq.exporters.folder import FolderExporter, model_dtype, write_folder
from aptq.meaning import Integers, meaning_of
from aptq.shards import TensorInfo
from aptq.targets import get_target


@dataclass(frozen=True)
class CompressedTensors(FolderExporter):
    """Write symmetric integers of 2 to 8 bits, mixed as the plan has them, as compressed-tensors stores them.

    ``weight_packed int32 [out, ceil(in bits / 32)]`` holds each row as one stream of codes, the lowest bits first;
    ``weight_scale [out, groups]`` is in the dtype of the model, ``weight_shape int64 [2]`` is ``[out, in]``. Each
    option of the plan is one of the ``config_groups``, its layers by name. A file is at most ``max_shard_size``.

    transformers needs the package compressed-tensors to load it (0.18 or later where a layer has 3, 5, 6 or 7 bits,
    whose layout was another one before), and turns the weights dense at the first use.

    Source: https://github.com/vllm-project/compressed-tensors, ``PackedQuantizationCompressor``.
    """

    def check(
        self,
        format: Format,
        format_name: str,
        options: Sequence[Option],
        *,
        shapes: Mapping[str, tuple[int, int]],
        config: Any,
    ) -> None:
        """Raise ``AptqError`` for another format than symmetric integers, and layers that the readers cannot take."""
        if not all(_is_symmetric_integer(format, option) for option in options):
            raise AptqError(
                f"exporter=compressed_tensors stores symmetric integers, which its readers agree on; got "
                f"format={format_name}. Use format=integer format.symmetric=true, with scales of 16 or 32 bits."
            )
        get_target("transformers").check(options, shapes)  # the least that any of its readers asks for
        experts = next((name for name in shapes if ".experts." in name), None)
        if experts is not None:
            raise AptqError(
                f"exporter=compressed_tensors cannot write mixtures of experts yet ({experts}); use exporter=native."
            )
        if config.model_type == "gpt2":
            raise AptqError(
                "exporter=compressed_tensors: its readers have no Conv1D, as GPT-2 has; use exporter=native."
            )
        dtype = model_dtype(config)
        other = {format.packed_layout(option, (32, 128))["scales"][1] for option in options} - {dtype}
        if other and dtype != torch.float32:
            wanted, scales = (str(each).removeprefix("torch.") for each in (dtype, other.pop()))
            raise AptqError(
                f"exporter=compressed_tensors stores scales in the model's dtype, {wanted}, to which those of "
                f"format.scale_dtype={scales} would be rounded once more; set format.scale_dtype={wanted}."
            )

    def export(self, job: ExportJob, folder: Path) -> None:
        """Write a model folder (see the class).

        Raises:
            AptqError: when the disk is too small, before or while writing.
        """
        groups: dict[Option, list[str]] = {}
        for name, option in job.plan.items():
            groups.setdefault(option, []).append(name)
        quantization = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": [] if "lm_head" in job.plan else ["lm_head"],
            "config_groups": {
                f"group_{number}": {"targets": groups[option], "weights": _scheme(option)}
                for number, option in enumerate(sorted(groups))
            },
        }
        write_folder(job, folder, _infos(job), _tensors(job), quantization, self.max_shard_size)


def _is_symmetric_integer(format: Format, option: Option) -> bool:
    """Whether codes of a format mean ``(code - 2^(bits-1)) * scale``, with nothing else stored."""
    meaning = meaning_of(format, option)
    return isinstance(meaning, Integers) and not meaning.stored_zeros


def _scheme(option: Option) -> dict[str, Any]:
    strategy = (
        {"strategy": "channel"} if option.group_size == -1 else {"strategy": "group", "group_size": option.group_size}
    )
    return {"num_bits": option.bits, "type": "int", **strategy, "symmetric": True, "dynamic": False}


def _infos(job: ExportJob) -> Iterator[TensorInfo]:
    """Yield what ``_tensors`` will, without packing anything."""
    for layer, option in job.plan.items():
        out_features, in_features = job.shapes[layer]
        words = -(-in_features * option.bits // 32)
        yield TensorInfo(f"{layer}.weight_packed", torch.int32, (out_features, words))
        scales = (out_features, option.num_groups(in_features))
        yield TensorInfo(f"{layer}.weight_scale", model_dtype(job.config), scales)
        yield TensorInfo(f"{layer}.weight_shape", torch.int64, (2,))
    yield from (TensorInfo.of(name, tensor) for name, tensor in job.full_precision())


def _tensors(job: ExportJob) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the checkpoint."""
    for layer, option in job.plan.items():
        shape = job.shapes[layer]
        quantized = job.format.unpack(job.packed(layer), option, shape)
        yield f"{layer}.weight_packed", packing.pack_rows(quantized.codes, option.bits)
        yield f"{layer}.weight_scale", quantized.parameters["scales"].T.to(model_dtype(job.config)).contiguous()
        yield f"{layer}.weight_shape", torch.tensor(shape)
    yield from job.full_precision()
