"""The backend for NVIDIA GPUs: Triton kernels that read the packed codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from aptq import packing
from aptq.api import AptqError, LayerSpec
from aptq.backends.planar import FLOATS, refuses_dtype, unreadable
from aptq.kernels.triton import read_table
from aptq.meaning import Levels, States, meaning_of

_CAPABILITY = (8, 0)  # the oldest that the kernels are compiled and counted for
_MOST_WORDS = 1 << 31  # that the kernels' 32-bit addresses reach


@dataclass(frozen=True)
class Triton:
    """Multiply by the codes themselves on a GPU.

    A few rows are summed in float32; up to 64 rows of half precision go through tensor cores, which take weights
    rounded to the dtype of the activations, and more are multiplied by the dense weight, unpacked for the moment.
    Sums are taken in one order: results are the same at every call.

    ``tuning`` is a table that ``benchmarks/kernels.py --tune`` wrote on such a GPU; without one, and for layers that
    are not in it, kernels and tiles are chosen by rules of thumb.
    """

    tuning: str | None = None

    @property
    def priority(self) -> int:
        """Before those of other devices, and ``reference``."""
        return 60

    def refuses(self, spec: LayerSpec) -> str | None:
        """Refuse other devices, dtypes and formats, machines without Triton, and a table that cannot be read."""
        if spec.device.type != "cuda":
            return f"it runs on a CUDA device, not on {spec.device.type}"
        if find_spec("triton") is None:
            return "Triton is not installed; pip install 'aptq[gpu]'"
        if torch.cuda.get_device_capability(spec.device) < _CAPABILITY:
            return "it needs a GPU of compute capability 8.0 or more (Ampere)"
        return self.refuses_layer(spec)

    def refuses_layer(self, spec: LayerSpec) -> str | None:
        """Say what of a layer the kernels cannot read, on whatever device."""
        if (reason := refuses_dtype(spec, FLOATS)) is not None:
            return reason
        if self.tuning is not None:
            try:
                read_table(self.tuning)
            except AptqError as error:
                return str(error)
        words = math.prod(packing.packed_shape(spec.out_features, spec.in_features, spec.option.bits))
        if words >= _MOST_WORDS:
            return f"it reads weights of less than {_MOST_WORDS} words, not of {words}"
        if (reason := unreadable(spec, states=True)) is not None:
            return reason
        if isinstance(meaning_of(spec.format, spec.option), States) and spec.option.bits > 6:
            return f"it reads states of codes of at most 6 bits, not {spec.option.bits}"
        return None

    def prepack(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Return codes and scales of the checkpoint, zeros as bytes ``[groups, out]``, and the table of values."""
        meaning = meaning_of(spec.format, spec.option)
        prepacked = {name: tensor for name, tensor in tensors.items() if name != "qzeros"}
        if "qzeros" in tensors:
            zeros = packing.unpack(tensors["qzeros"], spec.option.bits, spec.out_features)
            prepacked["zeros"] = zeros.contiguous()
        if isinstance(meaning, Levels):
            prepacked["levels"] = meaning.levels.to(tensors["qweight"].device)
        if isinstance(meaning, States):
            prepacked["states"] = _shared_table(meaning, tensors["qweight"].device)
        return prepacked

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """Return ``x @ W^T`` for ``x [..., in]``, as ``[..., out]`` in the dtype of ``x``."""
        size, table = spec.option.group_size, self.tuning or ""
        group = spec.in_features if size == -1 else size
        y: Tensor
        if "states" in tensors:
            packed = tensors["qweight"], tensors["scales"], tensors["states"]
            y = torch.ops.aptq.triton_states_matmul(x, *packed, group, table)
            return y
        y = torch.ops.aptq.triton_matmul(
            x,
            tensors["qweight"],
            tensors["scales"],
            tensors.get("scales_below"),
            tensors.get("zeros"),
            tensors.get("levels"),
            group,
            table,
        )
        return y


@lru_cache(maxsize=64)
def _shared_table(meaning: States, device: torch.device) -> Tensor:
    """Return one table for all layers of a kind, which the cache then holds once for a device."""
    return meaning.values.to(device)
