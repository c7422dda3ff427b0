"""Where the decoder blocks are and which matrices in them are layers, read from the model's own modules."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from aptq.api import Layer
from aptq.errors import AptqError
from aptq.models.experts import fused_num_experts

__all__ = [
    "Conv1DLayer",
    "LinearLayer",
    "apply_skip",
    "find_attentions",
    "find_blocks",
    "find_layers",
    "has_experts",
    "linear_names",
]


@dataclass(eq=False)
class LinearLayer:
    """An ``nn.Linear`` as a layer."""

    name: str
    module: nn.Module

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        out_features, in_features = self.weight().shape
        return out_features, in_features

    def weight(self) -> Tensor:
        """Return the weight ``[out, in]``, a view."""
        return cast(Tensor, self.module.weight).detach()

    def set_weight(self, weight: Tensor) -> None:
        """Write ``[out, in]`` into the module, cast to its dtype.

        Raises:
            ValueError: the weight has another shape.
            RuntimeError: the block is not loaded.
        """
        if tuple(weight.shape) != self.shape:  # copy_ would broadcast
            raise ValueError(f"{self.name}: weight of shape {tuple(weight.shape)}, expected {self.shape}")
        if self.weight().is_meta:
            raise RuntimeError(f"{self.name}: its block is not loaded, so there is nothing to write to")
        self.weight().copy_(weight)


class Conv1DLayer(LinearLayer):
    """GPT-2's ``Conv1D`` as a layer: it stores ``[in, out]``, the layer shows the transposed view."""

    def weight(self) -> Tensor:
        """Return the weight ``[out, in]``, a view."""
        return super().weight().T


def _as_layer(name: str, module: nn.Module) -> Layer | None:
    if isinstance(module, nn.Linear):
        return LinearLayer(name, module)
    if isinstance(module, Conv1D):
        return Conv1DLayer(name, module)
    return None


def linear_names(model: nn.Module) -> list[str]:
    """Return the name of every linear module of a model, heads and routers included."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _num_linear_weights(module: nn.Module) -> int:
    weights = (child.weight for child in module.modules() if isinstance(child, nn.Linear | Conv1D))
    return sum(weight.numel() for weight in weights)


def _is_stack(blocks: nn.ModuleList) -> bool:
    """Whether a list is a stack of decoder blocks: one class, or (hybrids) transformers' own mark of a block."""
    same = len({type(block) for block in blocks}) == 1
    return same or all(isinstance(block, GradientCheckpointingLayer) for block in blocks)


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterable[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield prefix + name, child
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the decoder blocks of a model by full name, in order.

    They are the children of the outermost ``nn.ModuleList`` that holds most linear weights.

    Raises:
        AptqError: no such list, or no linear layers in it.
    """
    stacks = [(name, blocks) for name, blocks in _outermost_lists(model) if len(blocks) and _is_stack(blocks)]
    name, blocks = max(stacks, key=lambda stack: _num_linear_weights(stack[1]), default=("", None))
    if blocks is None or _num_linear_weights(blocks) == 0:
        raise AptqError(
            f"{type(model).__name__}: no linear layers found in a stack of decoder blocks. aptq quantizes the "
            "nn.Linear and Conv1D weights of decoder-only transformers whose blocks lie in one nn.ModuleList; "
            "give such a model"
        )
    return {f"{name}.{index}": block for index, block in enumerate(blocks)}


def _num_experts(module: nn.Module) -> int | None:
    """Return how many experts a container holds, fused or listed; None when it is no container of experts."""
    if isinstance(module, nn.ModuleList):
        alike = len(module) > 1 and len({type(child) for child in module}) == 1
        return len(module) if alike and _num_linear_weights(module) else None
    return fused_num_experts(module)


def find_attentions(block: nn.Module) -> dict[str, nn.Module]:
    """Return the attention modules of a block by their name in it: the outermost whose class is called so.

    That is how transformers names them, in every family; nothing else tells them from other mixers of tokens.
    """
    return _outermost(block, "Attention")


def find_mlps(block: nn.Module) -> dict[str, nn.Module]:
    """Return the feed-forward modules of a block by their name in it, experts left out, as ``find_attentions`` does."""
    found = _outermost(block, "MLP")
    return {name: module for name, module in found.items() if not has_experts(module)}


def _outermost(block: nn.Module, word: str) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and word in type(module).__name__:
            found[name] = module
    return found


def has_experts(block: nn.Module) -> bool:
    """Whether a block sends each token through a few of many layers."""
    return any(_num_experts(child) is not None for child in block.modules() if child is not block)


def _routers(block: nn.Module) -> set[nn.Module]:
    """Return the linear modules that choose experts, or weigh them with a single output.

    Rounding a router changes which experts run; its few weights are not worth that.
    """
    found: set[nn.Module] = {
        module for module in block.modules() if isinstance(module, nn.Linear) and module.out_features == 1
    }
    for parent in block.modules():
        counts = {child: _num_experts(child) for child in parent.children()}
        widths = {count for count in counts.values() if count is not None}
        for child in (child for child, count in counts.items() if count is None):
            linears = [module for module in child.modules() if isinstance(module, nn.Linear)]
            # An attention next to the experts has more than one linear layer; a router is alone in its module.
            if len(linears) == 1 and linears[0].out_features in widths:
                found.add(linears[0])
    return found


def find_layers(block: nn.Module, name: str) -> dict[str, Layer]:
    """Return the layers of a block by full name, in the order of the modules, without its routers.

    Args:
        block: one decoder block, loaded or on ``meta``.
        name: its full name in the model, "model.layers.0".
    """
    routers = _routers(block)
    layers = ((f"{name}.{child}", module) for child, module in block.named_modules() if module not in routers)
    found = {full: _as_layer(full, module) for full, module in layers}
    return {full: layer for full, layer in found.items() if layer is not None}


def apply_skip(layers: Mapping[str, Layer], others: Iterable[str], patterns: Iterable[str]) -> dict[str, Layer]:
    """Drop the layers that a pattern names.

    Args:
        layers: all layers of the model by full name.
        others: linear modules that are no layers anyway (heads, routers); a pattern may name them too.
        patterns: shell globs of full names; ``*`` matches dots.

    Raises:
        AptqError: a pattern matches nothing, or nothing is left.
    """
    names = [*layers, *others]
    skipped: set[str] = set()
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(layers)[:3]
            raise AptqError(
                f"model.skip: {pattern!r} matches no linear layer. Patterns are globs of full names, "
                f"such as '*.down_proj'; near names: {', '.join(near)}"
            )
        skipped.update(matched)
    kept = {name: layer for name, layer in layers.items() if name not in skipped}
    if not kept:
        raise AptqError(f"model.skip: {list(patterns)} leaves no layer to quantize; name fewer")
    return kept
