"""Forward passes that stop at each layer until it has been rounded.

Rounding a layer takes its inputs from all calibration samples, and what comes after it should see the rounded weight.
Without this, a block is run twice: once to see every layer's input, once to get the rounded block's outputs. Here all
batches run at the same time as greenlets, one after the other from layer to layer, and once is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from aptq.api import AptqError
from aptq.calibration.walk import Step

_HINT = "Use true_sequential=false, which runs each block twice instead."


class Lockstep:
    """All batches of a step on their way through its block; made by ``lockstep``.

    Each batch that waits at a layer holds its activations, down to what the block's remaining layers need: at the
    widest place of a usual block, the input of its last layer beside the hidden states.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._main = getcurrent()
        self._outputs: list[Tensor | None] = [None] * len(step.inputs)
        self._passes = [greenlet(partial(self._run, index)) for index in range(len(step.inputs))]
        self._waiting: list[tuple[str, Tensor] | None] = []
        self._finished: set[str] = set()

    def _run(self, index: int) -> None:
        self._outputs[index] = self._step.inputs[index].run(self._step.block.module)

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return the forward pre-hook of one layer: it hands control, and the layer's input, to ``advance``."""

        def wait(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            if getcurrent() in self._passes:  # someone may run the block on the side, or another lockstep does
                self._main.switch((name, args[0]))

        return wait

    def advance(self) -> str | None:
        """Let every batch run to its next layer; return the layer's name, or None when the block has been run.

        Raises:
            AptqError: the block does not call its layers in one order for all batches, or a layer twice.
        """
        waiting = []
        with torch.no_grad(), self._step.autocast():
            state = _torch_state()
            for each in self._passes:
                waiting.append(each.switch())
                if _torch_state() != state:
                    raise AptqError(
                        f"{self._step.block.name} calls {waiting[-1]} inside a context that changes torch's own state, "
                        f"so its forward passes cannot stop there. {_HINT}"
                    )
        self._waiting = waiting
        names = {None if place is None else place[0] for place in waiting}
        if len(names) > 1 or names & self._finished:
            raise AptqError(
                f"{self._step.block.name} does not call its layers in the same order for all samples, each once: it "
                f"came to {', '.join(sorted(map(str, names)))} after {len(self._finished)} others. {_HINT}"
            )
        (name,) = names or {None}
        if name is None:
            self._step.outputs = [output for output in self._outputs if output is not None]
        else:
            self._finished.add(name)
        return name

    def inputs(self) -> list[Tensor]:
        """Return what the layer that all wait at is about to be called with, batch by batch."""
        return [place[1] for place in self._waiting if place is not None]

    def abandon(self) -> None:
        """End the batches that have not come to the end of the block, and let go of all tensors."""
        for each in self._passes:
            if not each.dead:
                each.throw()  # GreenletExit: runs their finally clauses and drops their activations
        self._waiting, self._outputs = [], []


def _torch_state() -> tuple[bool, ...]:
    """What contexts may change for the whole thread, and so for the other batches too."""
    devices = ("cpu", "cuda")
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *map(torch.is_autocast_enabled, devices))


@contextmanager
def lockstep(step: Step, layers: Iterable[str]) -> Iterator[Lockstep]:
    """Start a step's batches, to be stopped at each of ``layers``; hooks and activations are gone afterwards."""
    batches = Lockstep(step)
    handles = [step.block.layers[name].module.register_forward_pre_hook(batches.hook(name)) for name in layers]
    try:
        yield batches
    finally:
        for handle in handles:
            handle.remove()
        batches.abandon()
