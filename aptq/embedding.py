"""An input embedding that keeps its table packed."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from aptq.api import AptqError, Format, Option, RowFormat
from aptq.packed import PackedModule


class PackedEmbedding(PackedModule):
    """``table[ids]`` with a table ``[vocabulary, hidden]`` of which only the rows that are asked for are unpacked.

    A head that is tied to it is a ``PackedLinear`` whose ``holder`` is this module.

    Args:
        num_embeddings: rows of the table, one a token.
        embedding_dim: width of a row.
        format: what the codes mean; one that unpacks single rows.
        format_name: the format's name in the registry.
        option: bits and group size.
        dtype: of what is returned; default: torch's default dtype.
        scale: what rows are multiplied by, in ``dtype``; default: nothing. A tied head is not scaled.

    Raises:
        AptqError: when the format cannot unpack single rows, or store a table of this shape at this option.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        format: Format,
        format_name: str,
        option: Option,
        dtype: torch.dtype | None = None,
        scale: float | None = None,
    ) -> None:
        if not isinstance(format, RowFormat):
            raise AptqError(f"Format {format_name} cannot unpack single rows, as an embedding has to; use integer.")
        super().__init__(
            (num_embeddings, embedding_dim), format=format, format_name=format_name, option=option, dtype=dtype
        )
        self.num_embeddings, self.embedding_dim, self.scale = num_embeddings, embedding_dim, scale

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows ``[..., hidden]`` of tokens ``ids [...]``, in ``dtype`` and on their device."""
        format = cast(RowFormat, self.format)
        flat = ids.reshape(-1).to(self.device, torch.int64)
        found = format.unpack_rows(self.packed(), self.option, flat, self.embedding_dim)
        rows = format.dequantize(found, self.option).to(ids.device, self.dtype)
        if self.scale is not None:
            rows = rows * torch.tensor(self.scale, dtype=self.dtype)  # rounded, as the model's own module does it
        return rows.reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Tell shape, bits, group size and format."""
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, bits={self.option.bits}, "
            f"group_size={self.option.group_size}, format={self.format_name}"
            f"{'' if self.scale is None else f', scale={self.scale:g}'}"
        )
