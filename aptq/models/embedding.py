"""The input embedding of a model, read from the model's own modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aptq.errors import AptqError

__all__ = ["TokenEmbedding", "find_embedding"]

_PROBED = 4  # rows that the module is asked for, to see what it makes of them


@dataclass(frozen=True, eq=False)
class TokenEmbedding:
    """The table ``[vocabulary, hidden]`` that tokens are looked up in."""

    name: str
    table: Tensor
    scale: float | None  # what the module multiplies rows by
    head: str | None  # name of the linear head whose weight is the table, and stays it

    @property
    def shape(self) -> tuple[int, int]:
        """``(vocabulary, hidden)``."""
        return self.table.shape[0], self.table.shape[1]

    @property
    def num_bytes(self) -> int:
        """Size of the table as it is."""
        return self.table.numel() * self.table.element_size()


def find_embedding(model: PreTrainedModel, own_heads: set[str]) -> TokenEmbedding:
    """Return the input embedding of a model whose tensors outside the blocks are loaded.

    Args:
        model: as it was opened.
        own_heads: names of layers that are quantized by themselves: a head among them is no longer tied.

    Raises:
        AptqError: the model looks tokens up in another way, which a packed table could not take the place of.
    """
    module: Any = model.get_input_embeddings()
    names = {child: name for name, child in model.named_modules()}
    if not isinstance(module, nn.Embedding) or module not in names or module.weight.is_meta:
        raise _refusal(f"{type(model).__name__} has no nn.Embedding for tokens (it has {type(module).__name__})")
    table = module.weight.detach()
    sharing = [
        names[child]
        for child in names
        if child is not module and any(each is module.weight for each in child.parameters(recurse=False))
    ]
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if sharing and (sharing != [names.get(head)] or not isinstance(head, nn.Linear)):
        raise _refusal(f"{names[module]} shares its table with {', '.join(sharing)}, and only a linear head can")
    tied = sharing[0] if sharing and sharing[0] not in own_heads else None
    return TokenEmbedding(name=names[module], table=table, scale=_scale(module, names[module]), head=tied)


def _scale(module: nn.Embedding, name: str) -> float | None:
    """Return what an embedding multiplies its rows by, by trying it; raise ``AptqError`` when it does more."""
    stored: Any = getattr(module, "embed_scale", None)
    scale = None if stored is None else float(stored)
    rows = module.weight.detach()[:_PROBED]
    expected = rows if scale is None else rows * torch.tensor(scale, dtype=rows.dtype)
    with torch.no_grad():
        found = module(torch.arange(len(rows)))
    if module.max_norm is not None or not (found.shape == expected.shape and torch.equal(found, expected)):
        raise _refusal(f"{name}, a {type(module).__name__}, does more than to look rows up and to scale them")
    return scale


def _refusal(reason: str) -> AptqError:
    return AptqError(f"model.quantize_embeddings: {reason}; leave model.quantize_embeddings out.")
