"""Rounding the input embedding, and the modules that stand in for it and for a head that is tied to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aptq.api import AptqError, Callback, Curvature, Format, Option, QuantizedWeight, Quantizer, StoredEmbedding
from aptq.calibration.distribute import broadcast_tensors
from aptq.calibration.head_curvature import head_curvature
from aptq.calibration.walk import Walk
from aptq.embedding import PackedEmbedding
from aptq.layer import PackedLinear
from aptq.models.embedding import TokenEmbedding

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from aptq.models.source import ModelSource

STAGE = "embedding"
_ROWS = 4096
"""Rounded at a time: a grid expands its scales and zero points to a float for every weight."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TableCoding:
    """How an embedding's table is stored: by a format of its own, whatever the layers have."""

    format: Format
    option: Option
    config: Mapping[str, Any]  # name and options of the format
    quantizer: Quantizer  # of a table with a curvature: that of the layers

    def check(self, embedding: TokenEmbedding) -> None:
        """Raise ``AptqError`` when a table of this shape cannot be stored so."""
        self.format.check(self.option, embedding.shape)

    def of(self, embedding: TokenEmbedding) -> StoredEmbedding:
        """Return what an exporter is told of an embedding."""
        return StoredEmbedding(
            name=embedding.name,
            option=self.option,
            format_config=self.config,
            scale=embedding.scale,
            head=embedding.head,
        )


def round_table(
    table: Tensor, coding: TableCoding, curvature: Curvature | None, device: torch.device
) -> dict[str, Tensor]:
    """Return the packed tensors of a table ``[vocabulary, hidden]``, on the device that it is rounded on.

    Without a curvature each weight goes to the nearest level of its group: a row is looked up for its own sake. With
    one (``head_curvature``) the quantizer chooses the codes.
    """
    rounded = _rounding(coding, curvature)
    parts = [rounded(rows.to(device).float()) for rows in table.split(_ROWS)]
    # Scales and zero points are [groups, rows].
    joined = {name: torch.cat([each.parameters[name] for each in parts], dim=-1) for name in parts[0].parameters}
    codes = torch.cat([each.codes for each in parts])
    return coding.format.pack(QuantizedWeight(codes=codes, parameters=joined), coding.option)


def _rounding(coding: TableCoding, curvature: Curvature | None) -> Callable[[Tensor], QuantizedWeight]:
    """Return the function that rounds rows ``[rows, hidden]``."""
    quantizer, format, option = coding.quantizer, coding.format, coding.option
    if curvature is not None:
        factors = quantizer.prepare(curvature)
        return lambda rows: quantizer.quantize(rows, factors, format, option).weight

    def nearest(rows: Tensor) -> QuantizedWeight:
        grid = format.fit(rows[None], option)
        return grid.finish(grid.round(rows.T[None], slice(None))[0])

    return nearest


def behind_embedding(walk: Walk, coding: TableCoding, callbacks: Callback) -> Walk:
    """Return a walk with the embedding, and a head that is tied to it, as they will be stored."""
    curvature = head_curvature(
        walk, lambda done, name: callbacks.on_advance(stage=STAGE, done=done, detail=f"the head's inputs: {name}")
    )
    callbacks.on_advance(stage=STAGE, done=steps_of(walk.source) - 1, detail="rounding")
    return walk.between(packed_modules(walk.source, coding, walk.fabric, curvature))


def steps_of(source: ModelSource) -> int:
    """Return how many steps ``behind_embedding`` takes: the blocks where a head is tied, and the rounding."""
    tied = source.embedding is not None and source.embedding.head is not None
    return 1 + tied * len(source.block_names)


def packed_modules(
    source: ModelSource, coding: TableCoding, fabric: Fabric, curvature: Curvature | None = None
) -> dict[str, nn.Module]:
    """Return what stands in for modules of the model: the packed embedding, and the head that is tied to it if one is.

    They are on the CPU, as what is outside the blocks is. The first rank, which has the curvature if there is one,
    rounds, so that all have the same bits.

    Raises:
        AptqError: the table holds what cannot be stored: NaN, infinity, or values too large for a scale.
    """
    embedding = source.embedding
    assert embedding is not None
    tensors = None
    if fabric.global_rank == 0:
        try:
            tensors = round_table(embedding.table, coding, curvature, fabric.device)
        except AptqError as error:
            raise AptqError(
                f"model.quantize_embeddings: {embedding.name} cannot be stored at {coding.option.bits} bits, its "
                "values are not finite or too large for scales of float16; leave model.quantize_embeddings out."
            ) from error
    layout = coding.format.packed_layout(coding.option, embedding.shape)
    shared = broadcast_tensors(tensors, layout, 0, fabric)
    modules = _empty(source, embedding, coding)
    modules[embedding.name].load_state_dict({name: tensor.cpu() for name, tensor in shared.items()}, assign=True)
    for module in modules.values():
        if isinstance(module, PackedLinear):
            module.select_backend("reference")
    return modules


def _empty(source: ModelSource, embedding: TokenEmbedding, coding: TableCoding) -> dict[str, nn.Module]:
    """Return the modules, the table's tensors without memory yet."""
    rows, columns = embedding.shape
    how: dict[str, Any] = {
        "format": coding.format,
        "format_name": coding.config["name"],
        "option": coding.option,
        "dtype": embedding.table.dtype,
    }
    with torch.device("meta"):
        packed = PackedEmbedding(rows, columns, scale=embedding.scale, **how)
        modules: dict[str, nn.Module] = {embedding.name: packed}
        if embedding.head is not None:
            own = source.model.get_submodule(embedding.head)
            modules[embedding.head] = PackedLinear(columns, rows, bias=own.bias is not None, holder=packed, **how)
            modules[embedding.head].bias = own.bias
    return modules
