"""The backend for NVIDIA GPUs: Triton kernels that read the packed codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from aptq import packing
from aptq.api import AptqError, LayerSpec
from aptq.backends.planar import FLOATS, refuses_dtype, unreadable
from aptq.kernels.triton import read_table
from aptq.meaning import Blocks, Levels, States, Vectors, codebooks_of, meaning_of

_CAPABILITY = (8, 0)  # the oldest that the kernels are compiled and counted for
_MOST_CODEBOOKS = 16
_VECTORS = ("indices", "codebook", "residual_indices", "residual_codebook", "row_scales", "column_scales")
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
        if spec.option.bits <= 8 and isinstance(meaning := meaning_of(spec.format, spec.option), Vectors):
            return _refuses_vectors(spec, meaning)
        return unreadable(spec, states=True, blocks=True) or _refuses_meaning(spec)

    def prepack(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Return codes and scales of the checkpoint, zeros as bytes ``[groups, out]``, and tables of values.

        Selectors of codebooks become four bits for each 8 inputs, int16 ``[ceil(in / 32), out]``.
        """
        meaning = meaning_of(spec.format, spec.option)
        if isinstance(meaning, Vectors):
            return dict(tensors)
        device = tensors["qweight"].device
        prepacked = {name: tensors[name] for name in ("qweight", "scales", "scales_below") if name in tensors}
        if "qzeros" in tensors:
            zeros = packing.unpack(tensors["qzeros"], spec.option.bits, spec.out_features)
            prepacked["zeros"] = zeros.contiguous()
        if isinstance(meaning, Levels):
            prepacked["levels"] = meaning.levels.to(device)
        if isinstance(meaning, States):
            prepacked["states"] = _shared_table(meaning, device)
        if isinstance(meaning, Blocks):
            codebooks = codebooks_of(meaning, spec.format, spec.option, tensors["codebooks"])
            prepacked["levels"] = codebooks.flatten().to(device)
            if meaning.count > 1:
                prepacked["selectors"] = _selectors(tensors["selectors"], meaning, spec)
        if isinstance(meaning, Levels | Blocks) and meaning.scale_values is not None:
            values = meaning.scale_values.to(device)
            prepacked["scale_values"] = values * tensors["scale_unit"] if "scale_unit" in tensors else values
        return prepacked

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """Return ``x @ W^T`` for ``x [..., in]``, as ``[..., out]`` in the dtype of ``x``."""
        size, table = spec.option.group_size, self.tuning or ""
        group = spec.in_features if size == -1 else size
        y: Tensor
        if "codebook" in tensors:
            y = torch.ops.aptq.triton_vectors_matmul(x, *map(tensors.get, _VECTORS), spec.out_features, group, table)
            return y
        if "states" in tensors:
            packed = tensors["qweight"], tensors["scales"], tensors["states"]
            y = torch.ops.aptq.triton_states_matmul(x, *packed, group, table)
            return y
        if "selectors" in tensors or "scale_values" in tensors:
            names = ("qweight", "scales", "scale_values", "selectors", "levels")
            y = torch.ops.aptq.triton_blocks_matmul(x, *map(tensors.get, names), group, table)
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


def _refuses_meaning(spec: LayerSpec) -> str | None:
    """Say what of the codes the kernels cannot read, of codes and tensors that have a meaning."""
    meaning, bits, size = meaning_of(spec.format, spec.option), spec.option.bits, spec.option.group_size
    if isinstance(meaning, States) and bits > 6:
        return f"it reads states of codes of at most 6 bits, not {bits}"
    if isinstance(meaning, Blocks):
        if meaning.count > 1 and meaning.block_size % 8:
            return f"it reads blocks of a multiple of 8 inputs, not of {meaning.block_size}"
        if meaning.count > _MOST_CODEBOOKS or bits > 4:
            allowed = f"at most {_MOST_CODEBOOKS} codebooks of codes of at most 4 bits"
            return f"it reads {allowed}, not {meaning.count} of {bits}"
    in_bytes = isinstance(meaning, Levels | Blocks) and meaning.scale_values is not None
    in_spans = in_bytes or (isinstance(meaning, Blocks) and meaning.count > 1)
    if in_spans and size % 8 and -1 < size < spec.in_features:
        return f"it reads codebooks, and scales stored as bytes, in groups of a multiple of 8 inputs, not of {size}"
    return None


def _refuses_vectors(spec: LayerSpec, meaning: Vectors) -> str | None:
    """Say what of a layer of vectors the kernels cannot read."""
    layout = spec.format.packed_layout(spec.option, (spec.out_features, spec.in_features))
    for name, (shape, dtype) in layout.items():
        if name not in _VECTORS or dtype not in (*FLOATS, torch.int32):
            return f"it cannot read {name} of format {spec.format_name}, {dtype} of shape {tuple(shape)}"
    if meaning.index_bits > 8 or meaning.residual_bits not in (0, meaning.index_bits):
        found = f"{meaning.index_bits} and {meaning.residual_bits} bits"
        return f"it reads indices of at most 8 bits, and residual ones of as many, not of {found}"
    size = meaning.length * layout["codebook"][1].itemsize
    if size not in (4, 8, 16, 32) or meaning.length < 2:
        return f"it reads vectors of 4, 8, 16 or 32 bytes, not {meaning.length} numbers of {size} bytes"
    return None


def _selectors(packed: Tensor, meaning: Blocks, spec: LayerSpec) -> Tensor:
    """Return selectors as ``Triton.prepack`` has them."""
    chosen = packing.unpack(packed, meaning.selector_bits, spec.out_features)  # [blocks, out]
    eights = chosen.int().repeat_interleave(meaning.block_size // 8, 0)[: -(-spec.in_features // 8)]
    padded = functional.pad(eights, (0, 0, 0, -len(eights) % 4)).view(-1, 4, spec.out_features)
    places = torch.arange(4, dtype=torch.int32, device=packed.device)[:, None]
    return (padded << 4 * places).sum(1, dtype=torch.int32).to(torch.int16)


@lru_cache(maxsize=64)
def _shared_table(meaning: States, device: torch.device) -> Tensor:
    """Return one table for all layers of a kind, which the cache then holds once for a device."""
    return meaning.values.to(device)
