"""Running one attention (or feed-forward) module on the side, and what is seen of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from aptq.api import Layer

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with."""


@dataclass(frozen=True, eq=False)
class Watched:
    """A module, the layers in it that are measured, and the one that they all lead to."""

    name: str
    module: nn.Module
    layers: Mapping[str, Layer]
    output: Layer
    head_dim: int  # 0 where the module has no heads

    def heads(self, name: str) -> int:
        """Return how many blocks of a layer's rows are heads; 1 where the rows are no whole number of them."""
        rows = self.layers[name].shape[0]
        return rows // self.head_dim if self.head_dim and rows % self.head_dim == 0 else 1

    def split(self, name: str, tensor: Tensor) -> Tensor:
        """View ``[samples, tokens, out]`` as ``[samples, tokens, heads, rows]``."""
        split: Tensor = tensor.unflatten(-1, (self.heads(name), -1))
        return split


@dataclass(eq=False)
class Seen:
    """One layer in one run of its module."""

    input: Tensor  # [samples, tokens, in]
    output: Tensor  # [samples, tokens, out], part of autograd's graph


@dataclass(frozen=True, eq=False)
class DotProduct:
    """One call of torch's ``scaled_dot_product_attention``."""

    query: Tensor  # [samples, heads, tokens, m]
    key: Tensor  # [samples, heads or fewer, tokens, m]
    mask: Tensor | None  # of bool (True: attend) or added to the scores
    causal: bool
    scale: float | None


@dataclass(eq=False)
class ModuleRun:
    """What one run of a module showed."""

    call: Call
    seen: dict[str, Seen] = field(default_factory=dict)  # the measured layers
    mixed: Tensor | None = None  # input of the output layer
    projected: Tensor | None = None  # its output
    attentions: list[DotProduct] = field(default_factory=list)
    output: Tensor = field(default_factory=lambda: torch.empty(0))  # of the module

    @property
    def ends_with_output_layer(self) -> bool:
        """Whether the module returns what its output layer gives, and nothing is done to it."""
        return self.projected is not None and torch.equal(self.projected, self.output)


class _DotProducts(TorchFunctionMode):
    """Keeps the arguments of ``scaled_dot_product_attention`` while the context lasts."""

    def __init__(self, found: list[DotProduct]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            self._found.append(_dot_product(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _dot_product(  # torch's own signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> DotProduct:
    del value, dropout_p, enable_gqa  # fewer keys than queries are told from their shapes
    return DotProduct(query.detach(), key.detach(), attn_mask, is_causal, scale)


def run_module(watched: Watched, call: Call) -> ModuleRun:
    """Run a module so that its output can be differentiated by the outputs of its layers."""
    run = ModuleRun(call)

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            del module
            output = output if output.requires_grad else output.detach().requires_grad_()
            run.seen[name] = Seen(inputs[0].detach(), output)
            return output

        return hook

    def keep_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del module
        run.mixed, run.projected = inputs[0].detach(), output.detach()

    args, kwargs = call
    with ExitStack() as stack, torch.enable_grad():
        for name, layer in watched.layers.items():
            stack.callback(layer.module.register_forward_hook(keep(name)).remove)
        stack.callback(watched.output.module.register_forward_hook(keep_output).remove)
        stack.enter_context(_DotProducts(run.attentions))
        output = watched.module(*args, **kwargs)
    run.output = output[0] if isinstance(output, tuple) else output
    return run


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Let a module do something else while the context lasts."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class's own method shows again
