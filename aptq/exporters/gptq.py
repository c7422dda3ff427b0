"""The checkpoint of GPTQ: what GPTQModel reads without aptq, and vLLM and SGLang at 4 and 8 bits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aptq import packing
from aptq.api import AptqError, ExportJob, Format, Option
from aptq.exporters.folder import FolderExporter, check_linear, write_folder
from aptq.fusion import fused_groups
from aptq.meaning import Integers, meaning_of
from aptq.names import place
from aptq.shards import TensorInfo
from aptq.targets import get_target

_STACKED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
"""What vLLM calls the stack that begins with a layer: it looks the stack's own name up."""


@dataclass(frozen=True)
class GPTQ(FolderExporter):
    """Write integers of 2, 3, 4 or 8 bits, mixed as the plan has them, as GPTQ's checkpoints store them.

    A layer ``[out, in]`` of ``b`` bits with ``G`` groups has ``qweight int32 [in b / 32, out]``, each column one stream
    of codes, the lowest bits first; ``qzeros int32 [G, out b / 32]``, rows of zero points packed likewise; ``scales
    float16 [G, out]``; and ``g_idx int32 [in]``, the group of each input. Symmetric layers are written in the first
    version of the format, which stores a zero point as one less than it is and which everyone reads; asymmetric ones
    in the second ("gptq_v2"), which stores it as it is, so that a zero of 0 does not wrap around. ``dynamic`` in the
    config tells layers apart that do not have the commonest option. A file is at most ``max_shard_size``.

    Source: https://github.com/ModelCloud/GPTQModel, as its checkpoints are and as it reads them.
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
        """Raise ``AptqError`` for other formats than integers, and for layers that the readers cannot take."""
        meanings = [meaning_of(format, option) for option in options]
        if not all(isinstance(meaning, Integers) for meaning in meanings):
            raise AptqError(f"exporter=gptq stores integers; got format={format_name}. Use format=integer.")
        get_target("gptq").check(options, shapes)
        if any(format.packed_layout(option, (32, 128))["scales"][1] != torch.float16 for option in options):
            raise AptqError("exporter=gptq stores scales in float16; set format.scale_dtype=float16.")
        check_linear("gptq", shapes, config)
        for name, (out_features, in_features) in shapes.items():
            if out_features % 32 or in_features % 32:
                raise AptqError(
                    f"exporter=gptq packs 32 codes at a time, without padding; {name} is "
                    f"{out_features} x {in_features}. Leave it out (model.skip), or use exporter=native."
                )

    def export(self, job: ExportJob, folder: Path) -> None:
        """Write a model folder (see the class).

        Raises:
            AptqError: when the disk is too small, before or while writing.
        """
        infos, symmetric = list(_infos(job)), _is_symmetric(job)
        quantization = _config(job, _left_out(infos), symmetric)
        write_folder(job, folder, infos, _tensors(job, symmetric), quantization, self.max_shard_size)


def _is_symmetric(job: ExportJob) -> bool:
    meanings = (meaning_of(job.format, option) for option in set(job.plan.values()))
    return not any(isinstance(meaning, Integers) and meaning.stored_zeros for meaning in meanings)


def _config(job: ExportJob, left_out: Iterable[str], symmetric: bool) -> dict[str, Any]:
    """Return the ``quantization_config``: the commonest option, and in ``dynamic`` all that differs from it."""
    chosen = list(job.plan.values())
    common = max(sorted(set(chosen)), key=chosen.count)
    version = "gptq" if symmetric else "gptq_v2"
    dynamic: dict[str, dict[str, Any]] = {f"-:{_pattern([name])}": {} for name in left_out}
    for option in sorted(set(chosen) - {common}):
        names = [name for name, mine in job.plan.items() if mine == option]
        dynamic[f"+:{_pattern([*names, *_stacks(job, option)])}"] = {
            "bits": option.bits,
            "group_size": option.group_size,
        }
    return {
        "quant_method": "gptq",
        "checkpoint_format": version,
        "format": version,
        "bits": common.bits,
        "group_size": common.group_size,
        "sym": symmetric,
        "desc_act": False,  # whatever order columns were rounded in, they are stored in their own
        "lm_head": "lm_head" in job.plan,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _left_out(infos: Iterable[TensorInfo]) -> Iterator[str]:
    """Yield what has a weight of full precision within the blocks: readers look for packed ones in all they know."""
    for info in infos:
        module = info.name.removesuffix(".weight")
        if module != info.name and place(module)[0] is not None and len(info.shape) == 2:
            yield module


def _stacks(job: ExportJob, option: Option) -> list[str]:
    """Return vLLM's names of stacks whose layers all have an option."""
    names = []
    for group in fused_groups(job.plan):
        parent, _, own = group[0].rpartition(".")
        if own in _STACKED and all(job.plan[name] == option for name in group):
            names.append(f"{parent}.{_STACKED[own]}")
    return names


def _pattern(names: Sequence[str]) -> str:
    """Return a regular expression that matches names and nothing else."""
    return f"^({'|'.join(map(re.escape, names))})$"


def _infos(job: ExportJob) -> Iterator[TensorInfo]:
    """Yield what ``_tensors`` will, without packing anything."""
    for layer, option in job.plan.items():
        out_features, in_features = job.shapes[layer]
        groups = option.num_groups(in_features)
        yield TensorInfo(f"{layer}.qweight", torch.int32, (in_features * option.bits // 32, out_features))
        yield TensorInfo(f"{layer}.qzeros", torch.int32, (groups, out_features * option.bits // 32))
        yield TensorInfo(f"{layer}.scales", torch.float16, (groups, out_features))
        yield TensorInfo(f"{layer}.g_idx", torch.int32, (in_features,))
    yield from (TensorInfo.of(name, tensor) for name, tensor in job.full_precision())


def _tensors(job: ExportJob, symmetric: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the checkpoint."""
    less = 1 if symmetric else 0
    for layer, option in job.plan.items():
        shape = job.shapes[layer]
        quantized = job.format.unpack(job.packed(layer), option, shape)
        scales = quantized.parameters["scales"]
        zeros = quantized.parameters.get("zeros")
        if zeros is None:
            zeros = torch.full(scales.shape, (1 << (option.bits - 1)) - less, dtype=torch.uint8)
        yield f"{layer}.qweight", packing.pack_rows(quantized.codes, option.bits).T.contiguous()
        yield f"{layer}.qzeros", packing.pack_rows(zeros.contiguous(), option.bits)
        yield f"{layer}.scales", scales.contiguous()
        columns = torch.arange(shape[1], dtype=torch.int32)
        yield f"{layer}.g_idx", columns // option.group_width(shape[1])
    yield from job.full_precision()
