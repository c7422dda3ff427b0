"""The model, as data: options, layers, blocks and what feeds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True, order=True)
class Option:
    """One way to store a layer: what an allocator chooses.

    ``bits`` is the width of one code; ``group_size`` the number of consecutive inputs that share their parameters,
    or -1 when a whole row does. The last group of a row is shorter when the width is no multiple of the group size.
    ``format`` is the name of the format, which matters to a ``FormatSet`` only: other formats go by their own fields.
    """

    bits: int
    group_size: int
    format: str = ""

    def num_groups(self, in_features: int) -> int:
        """Return how many groups a row of ``in_features`` weights has."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    def group_width(self, in_features: int) -> int:
        """Return how many weights of such a row share their parameters: a group's, or all that there are."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)


class Layer(Protocol):
    """One weight matrix of the model, seen as ``[out, in]`` whatever module holds it (Linear, Conv1D)."""

    name: str  # full dotted name in the model, "model.layers.0.self_attn.q_proj"
    module: nn.Module

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""

    def weight(self) -> Tensor:
        """Return the weight ``[out, in]``, in the model's dtype and on its device (a view where possible)."""

    def set_weight(self, weight: Tensor) -> None:
        """Write ``[out, in]`` back into the module, cast to its dtype."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Block:
    """One transformer layer with its weights on the device, and the linear layers in it."""

    index: int
    name: str  # "model.layers.0"
    module: nn.Module
    layers: Mapping[str, Layer]  # by full name, in the order of the model
    guidance: Mapping[str, Tensor] = field(default_factory=dict)  # what a ``GuidedEstimator`` asked for, by module


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockInputs:
    """What one batch of calibration samples feeds a block: all that ``block.module`` is called with."""

    hidden: Tensor  # [batch, tokens, width]
    args: tuple[Any, ...]  # positional arguments after the hidden states
    kwargs: Mapping[str, Any]  # masks, rotary embeddings, ... shared by all batches of this shape
    samples: Sequence[int] = ()  # which of all calibration samples these are, for who draws random numbers for each

    def run(self, module: nn.Module) -> Tensor:
        """Call the block and return its new hidden states ``[batch, tokens, width]``."""
        output = module(self.hidden, *self.args, **self.kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden
