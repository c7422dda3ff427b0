"""Calibrating and checking a model whose layers quantize what they are called with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from aptq.api import ActivationQuantizer, Layer, Transform


@contextmanager
def quantized_inputs(
    layers: Iterable[Layer],
    activation: ActivationQuantizer | None,
    transform: Transform | None = None,
    *,
    as_stored: bool = False,
) -> Iterator[None]:
    """Have layers called with quantized inputs while the context lasts, as they will be in the written model.

    Hooks that are set inside see the quantized inputs. Layers that are called with one tensor get one tensor again, so
    that it still shows that they share it. With a transform they are quantized in its basis, and come in the model's
    own, or ``as_stored`` in the transform's, for layers whose weights are in it.
    """
    # By identity, and no longer than the input lives: forward passes may be interleaved (see ``lockstep``).
    known = WeakIdKeyDictionary()

    def changed(x: Tensor) -> Tensor:
        x = x if transform is None else transform.apply(x)
        x = x if activation is None else activation.quantize(x)
        return x if transform is None or as_stored else transform.invert(x)

    def change(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        x, *others = args
        if x not in known:
            known[x] = changed(x)
        return (known[x], *others)

    needed = activation is not None or (as_stored and transform is not None)
    with ExitStack() as stack:
        for layer in layers if needed else ():
            stack.callback(layer.module.register_forward_pre_hook(change).remove)
        yield
