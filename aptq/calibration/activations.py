"""Calibrating and checking a model whose layers quantize what they are called with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from aptq.api import ActivationQuantizer, Layer, Transform


@contextmanager
def quantized_inputs(
    layers: Iterable[Layer], activation: ActivationQuantizer | None, transform: Transform | None = None
) -> Iterator[None]:
    """Have layers called with quantized inputs while the context lasts, as they will be in the written model.

    Hooks that are set inside see the quantized inputs. Layers that are called with one tensor get one tensor again, so
    that it still shows that they share it. With a transform they are quantized in its basis, and come in their own.
    """
    # By identity, and no longer than the input lives: forward passes may be interleaved (see ``lockstep``).
    known = WeakIdKeyDictionary()

    def quantize(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        assert activation is not None
        x, *others = args
        if x not in known:
            rounded = activation.quantize(x if transform is None else transform.apply(x))
            known[x] = rounded if transform is None else transform.invert(rounded)
        return (known[x], *others)

    with ExitStack() as stack:
        for layer in layers if activation is not None else ():
            stack.callback(layer.module.register_forward_pre_hook(quantize).remove)
        yield
