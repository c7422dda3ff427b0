"""The checkpoint of the package ``vptq``: vector codebooks that transformers loads on CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aptq import packing
from aptq.api import AptqError, ExportJob, Format, Option
from aptq.exporters.folder import FolderExporter, check_linear, model_dtype, write_folder
from aptq.shards import TensorInfo

_KNOWN = {
    *("indices", "codebook", "residual_indices", "residual_codebook", "column_scales"),
    *("outlier_indices", "outlier_codebook", "outlier_columns"),
}
"""Tensors of a vector format that the checkpoint has a place for."""

_LENGTHS = (2, 4, 6, 8, 10, 12, 16)
_INDEX_BITS = (4, 8, 10, 12, 13, 14, 15, 16)
_RESIDUAL_BITS = (0, *range(2, 13), 15, 16)
_OUTLIER_LENGTH = 4
"""What the reader's kernels are made for."""


@dataclass(frozen=True)
class VPTQ(FolderExporter):
    """Write vector codebooks as ``vptq.VQuantLinear`` reads them.

    With ``G`` groups of columns, ``k`` centroids of length ``v`` and ``k2`` residual ones, a layer has
    ``centroids.weight [G, k v]``, ``res_centroids.weight [G, k2 v]`` and ``indices int32 [G, ceil(out / v), words]``,
    each row of which is one stream of ``residual index * k + index``. Outliers have ``outlier_centroids.weight`` and
    ``outlier_indices int16 [1, out / v0, outliers]``; ``perm`` then says which column is at each place, outliers first.
    Column scales are ``weight_scale``, beside a ``weight_bias`` of 0. A file is at most ``max_shard_size``.

    Source: https://github.com/microsoft/VPTQ, ``VQuantLinear`` and the package's way to pack, as read there; what
    transformers takes is its own ``VptqConfig``. The package is for CUDA only: this was not run with it.
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
        """Raise ``AptqError`` for formats, codebooks and layers that the reader has no place for."""
        check_linear("vptq", shapes, config)
        dtype = model_dtype(config)
        for option in options:
            for name, shape in shapes.items():
                layout = format.packed_layout(option, shape)
                if not {"indices", "codebook"} <= set(layout) <= _KNOWN:
                    raise AptqError(
                        f"exporter=vptq stores vector codebooks with column scales or none; got format={format_name}. "
                        "Use format=vector format.normalize=columns (or none)."
                    )
                _check_layer(name, _Layer(layout, shape), layout["codebook"][1], dtype)

    def export(self, job: ExportJob, folder: Path) -> None:
        """Write a model folder (see the class).

        Raises:
            AptqError: when the disk is too small, before or while writing.
        """
        layers = {name: _layer(job, name) for name in job.plan}
        quantization = {
            "quant_method": "vptq",
            "enable_proxy_error": False,
            "config_for_layers": {name: layer.config() for name, layer in layers.items()},
            "shared_layer_config": {},
            "modules_to_not_convert": [] if "lm_head" in job.plan else ["lm_head"],
        }
        infos = (TensorInfo.of(name, tensor) for name, tensor in _tensors(job))
        write_folder(job, folder, infos, _tensors(job), quantization, self.max_shard_size)


@dataclass(frozen=True)
class _Layer:
    """What a layer's packed layout says of its codebooks."""

    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    shape: tuple[int, int]

    def book(self, name: str) -> tuple[int, int]:
        """Return the number of centroids and their length; -1 where there are none."""
        return self.layout[name][0][-2:] if name in self.layout else (-1, -1)  # type: ignore[return-value]

    @property
    def groups(self) -> int:
        return self.layout["codebook"][0][0]

    @property
    def outliers(self) -> int:
        return self.layout["outlier_columns"][0][0] if "outlier_columns" in self.layout else 0

    def index_bits(self, name: str) -> int:
        """Return the bits of an index into a codebook; 0 where there is none."""
        return max(self.book(name)[0], 1).bit_length() - 1

    def config(self) -> dict[str, Any]:
        """Return the arguments of ``vptq.VQuantLinear``, those of outliers before the others."""
        (k0, v0), (k, v), (k2, _) = (self.book(each) for each in ("outlier_codebook", "codebook", "residual_codebook"))
        return {
            "in_features": self.shape[1],
            "out_features": self.shape[0],
            "vector_lens": [v0, v],
            "num_centroids": [k0, k],
            "num_res_centroids": [-1, k2],
            "group_num": self.groups,
            "group_size": (self.shape[1] - self.outliers) // self.groups,
            "outlier_size": self.outliers,
            "enable_norm": "column_scales" in self.layout,
            "norm_dim": 0,
            "enable_perm": self.outliers > 0,
            "indices_as_float": False,
            "is_indice_packed": True,
        }


def _layer(job: ExportJob, name: str) -> _Layer:
    return _Layer(job.format.packed_layout(job.plan[name], job.shapes[name]), job.shapes[name])


def _check_layer(name: str, layer: _Layer, stored: torch.dtype, dtype: torch.dtype) -> None:
    """Raise ``AptqError`` where the reader's kernels were not made for a layer."""
    _, length = layer.book("codebook")
    bits, residual = layer.index_bits("codebook"), layer.index_bits("residual_codebook")
    if length not in _LENGTHS or bits not in _INDEX_BITS or residual not in _RESIDUAL_BITS:
        raise AptqError(
            f"exporter=vptq: the reader has no kernel for vectors of {length} with indices of {bits} and residual ones "
            f"of {residual} bits; use lengths of {_LENGTHS}, {_INDEX_BITS} bits and {_RESIDUAL_BITS} residual bits."
        )
    if layer.outliers and layer.book("outlier_codebook")[1] != _OUTLIER_LENGTH:
        raise AptqError(
            f"exporter=vptq: the reader takes outlier vectors of {_OUTLIER_LENGTH} only; set "
            f"format.outlier_codebook=v{_OUTLIER_LENGTH}-k{layer.book('outlier_codebook')[0]}."
        )
    if (layer.shape[1] - layer.outliers) % layer.groups or layer.shape[1] >= 1 << 16:
        raise AptqError(
            f"exporter=vptq: {name} has {layer.shape[1]} inputs, {layer.outliers} of them outliers, which do not make "
            f"{layer.groups} groups of one size below 65536 inputs; set format.group_size=-1 or one that divides them."
        )
    if dtype not in (torch.float32, stored):
        told = str(dtype).removeprefix("torch.")
        raise AptqError(
            f"exporter=vptq stores codebooks that the reader casts to the model's dtype, {told}; set "
            f"format.scale_dtype={told}."
        )


def _tensors(job: ExportJob) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the checkpoint; twice the same when called twice."""
    for name in job.plan:
        for key, tensor in layer_tensors(job.packed(name), _layer(job, name)).items():
            yield f"{name}.{key}", tensor
    yield from job.full_precision()


def layer_tensors(packed: Mapping[str, Tensor], layer: _Layer) -> dict[str, Tensor]:
    """Return a layer's tensors as the reader names them (see the class), from those that its format packed."""
    width, common = layer.shape[1], layer.shape[1] - layer.outliers
    bits, residual = layer.index_bits("codebook"), layer.index_bits("residual_codebook")
    words = packing.unpack(packed["indices"], bits, common).long()
    tensors = {"centroids.weight": packed["codebook"].flatten(1)}
    if residual:
        words |= packing.unpack(packed["residual_indices"], residual, common).long() << bits
        tensors["res_centroids.weight"] = packed["residual_codebook"].flatten(1)
    by_group = words.unflatten(1, (layer.groups, -1)).transpose(0, 1)  # [G, vectors, columns]
    streams = packing.pack_rows(by_group.flatten(0, 1), bits + residual)
    tensors["indices"] = streams.view(layer.groups, len(words), -1)
    if layer.outliers:
        columns = packed["outlier_columns"].long()
        finer = packing.unpack(packed["outlier_indices"], layer.index_bits("outlier_codebook"), layer.outliers)
        tensors["outlier_centroids.weight"] = packed["outlier_codebook"].flatten()[None]
        tensors["outlier_indices"] = finer.to(torch.int16)[None].contiguous()  # the bits of uint16
        is_common = torch.ones(width, dtype=torch.bool)
        is_common[columns] = False
        tensors["perm"] = torch.cat([columns, is_common.nonzero()[:, 0]]).to(torch.int16)
    if "column_scales" in packed:
        tensors["weight_scale"] = packed["column_scales"]
        tensors["weight_bias"] = torch.zeros_like(packed["column_scales"])
    return tensors
