"""One generator of blocks: the only place where a model is walked.

The model's own forward pass, with every block replaced by a stand-in that hands its input on, tells what each block is
called with (masks, rotary embeddings, whatever the family passes): nothing about families is assumed. Then blocks come
to the device one at a time, each fed with what the block before made of the calibration samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aptq.api import AptqError, Block, BlockInputs, BlockObserver
from aptq.calibration.distribute import all_finite
from aptq.models.opening import exchanged

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from aptq.models.source import ModelSource

_TOKENS = 32
_Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional (after the hidden states) and keyword arguments


@dataclass(eq=False, kw_only=True)
class Step:
    """One block of the walk: its weights on the device and this rank's inputs to it.

    Whoever takes the step may change the block's weights and must leave ``outputs`` behind.
    """

    block: Block
    inputs: Sequence[BlockInputs]
    outputs: list[Tensor] = field(default_factory=list)
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext  # the precision that blocks run in
    last: bool = False  # nothing follows (the head): outputs, which are logits, are not kept
    full_precision: Step | None = None  # the same block with what the full-precision model feeds it, where asked for

    def run(self) -> None:
        """Run the block on every batch and keep its outputs."""
        if not self.last:
            with torch.no_grad(), self.autocast():
                self.outputs = [batch.run(self.block.module) for batch in self.inputs]

    def observe(self, observer: BlockObserver, *, keep_outputs: bool) -> None:
        """Run the block through an observer and, if asked, keep the outputs that it gives."""
        with torch.no_grad(), self.autocast():
            for batch in self.inputs:
                output = observer(batch)
                if keep_outputs and output is not None and not self.last:
                    self.outputs.append(output)

    @property
    def tokens(self) -> int:
        """Tokens of this rank's samples."""
        return sum(batch.hidden.shape[0] * batch.hidden.shape[1] for batch in self.inputs)


class Walk:
    """The calibration samples on their way through the model."""

    def __init__(self, source: ModelSource, samples: Tensor, batch_size: int, fabric: Fabric) -> None:
        """Take this rank's slice of ``samples [num, tokens]`` (no padding: ranks may have unequal shares)."""
        self.source = source
        self.fabric = fabric
        self.samples = samples
        self.total_tokens = samples.numel()
        mine = samples[fabric.global_rank :: fabric.world_size]
        self._batches = list(mine.split(batch_size)) if len(mine) else []
        numbers = range(fabric.global_rank, len(samples), fabric.world_size)
        self._numbers = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
        self._calls: dict[tuple[int, ...], list[_Call]] = {}  # by shape of the batch, one entry a block
        self._returns_tuple = False
        self.last_hidden: list[Tensor] = []
        self.guidance: Callable[[int], Mapping[str, Tensor]] | None = None  # by index of the block; see ``Block``
        self.outside: Mapping[str, nn.Module] = {}  # stand in for the model's own around the blocks; see ``between``
        self._last_full_precision: list[Tensor] = []
        # Fabric's precision is for float32 models; others run in the dtype that they were stored in.
        self.autocast = fabric.autocast if source.dtype == torch.float32 else nullcontext

    def beginning(self, samples: int, tokens: int | None = None) -> Walk:
        """Return a walk of its own with the first samples, one in a batch, and all or the first tokens of each."""
        return Walk(self.source, self.samples[:samples, :tokens], 1, self.fabric).between(self.outside)

    def between(self, outside: Mapping[str, nn.Module]) -> Walk:
        """Return this walk with modules in the places of the model's own, by name, before or behind the blocks.

        Such are a quantized embedding and the head that is tied to it. The full-precision activations that ``blocks``
        sends along do not meet them.
        """
        walk = copy.copy(self)
        walk.outside = outside
        return walk

    def steps(self, *, full_precision: bool = False) -> Iterator[Step]:
        """Yield each block in turn, then the head if it is to be quantized; take and raise what ``blocks`` does."""
        yield from self.blocks(full_precision=full_precision)
        if (name := self.source.head_name) is not None:
            originals = self._head_inputs(name, self._last_full_precision) if full_precision else None
            yield self._step(self._guided(self.source.load_head()), self.head_inputs(name), originals, last=True)

    def step(self, block: Block, hidden: Sequence[Tensor]) -> Step:
        """Return the step of a block that is fed hidden states from elsewhere, batch by batch."""
        return self._step(self._guided(block), self.inputs(block.index, hidden), None)

    def blocks(self, *, full_precision: bool = False) -> Iterator[Step]:
        """Yield each block in turn; raise ``AptqError`` where activations stop being finite.

        ``full_precision`` sends a second set of activations along: those of the model as it was. Each step has them in
        a step of their own, which has to be run *before* the block's weights change. One more hidden state a sample.
        """
        hidden = self.first_inputs()
        beside = None if not full_precision else self.between({}).first_inputs() if self.outside else hidden
        for index in range(len(self.source.block_names)):
            block = self._guided(self.source.load_block(index, self.fabric.device))
            originals = None if beside is None else self.inputs(index, beside)
            step = self._step(block, self.inputs(index, hidden), originals)
            del hidden, beside, originals
            yield step
            hidden = step.outputs
            beside = None if step.full_precision is None else step.full_precision.outputs
            self.source.release_block(index)
            if not all(all_finite(x) for x in hidden):
                raise AptqError(
                    f"The outputs of block {block.name} hold NaN or Inf. If the model is stored in float16, try "
                    "model.dtype=bfloat16 or float32; otherwise look at its weights, or at a damping that is too small."
                )
        self.last_hidden, self._last_full_precision = hidden, beside or []

    def _guided(self, block: Block) -> Block:
        return block if self.guidance is None else replace(block, guidance=self.guidance(block.index))

    def _step(
        self, block: Block, inputs: list[BlockInputs], originals: list[BlockInputs] | None, last: bool = False
    ) -> Step:
        step = Step(block=block, inputs=inputs, autocast=self.autocast, last=last)
        if originals is not None:
            step.full_precision = Step(block=block, inputs=originals, autocast=self.autocast, last=last)
        return step

    def head_inputs(self, name: str) -> list[BlockInputs]:
        """Return what the head of that name is called with after the whole walk, one sample each."""
        return self._head_inputs(name, self.last_hidden)

    def _head_inputs(self, name: str, last_hidden: list[Tensor]) -> list[BlockInputs]:
        """Run what lies between the last block and the head; one sample each, since its outputs are wide."""
        caught: list[BlockInputs] = []

        def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            numbers = self._numbers[number]
            caught.extend(
                BlockInputs(hidden=sample, args=(), kwargs={}, samples=numbers[place : place + 1])
                for place, sample in enumerate(args[0].split(1))
            )
            raise _Reached

        handle = self.source.model.get_submodule(name).register_forward_pre_hook(catch)
        try:
            for number, hidden in enumerate(last_hidden):
                with suppress(_Reached), torch.no_grad():
                    self._run_around(self._batches[number], hidden)
        finally:
            handle.remove()
        return caught

    def _run_around(self, batch: Tensor, hidden: Tensor, **options: Any) -> Any:
        """Run the model on a batch with ``hidden`` as what its blocks make of it."""
        stand_ins = _stand_ins(self._modules(), _Recording(), self._returns_tuple, final=hidden)
        with exchanged(self.source.model, self.outside), stand_ins, self.autocast():
            return self.source.model(input_ids=batch, use_cache=False, **options)

    def finish(
        self, number: int, hidden: Tensor, last_tokens: int | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Run what lies behind the blocks, a sample at a time: yield its number, its tokens and its logits.

        Args:
            number: of this rank's batch.
            hidden: ``[samples, tokens, width]``, what the blocks make of the batch; gradients go through.
            last_tokens: so many of each sample are run, from its end; all by default.
        """
        few = slice(None if last_tokens is None else -last_tokens, None)
        for place, sample in enumerate(self._numbers[number]):
            tokens = self._batches[number][place : place + 1, few]
            yield sample, tokens, self._run_around(tokens, hidden[place : place + 1, few]).logits

    def inputs(self, index: int, hidden: Sequence[Tensor]) -> list[BlockInputs]:
        """Return what a block is called with, batch by batch."""
        inputs = []
        for batch, numbers, states in zip(self._batches, self._numbers, hidden, strict=True):
            args, kwargs = self._calls[tuple(batch.shape)][index]
            inputs.append(BlockInputs(hidden=states, args=args, kwargs=kwargs, samples=numbers))
        return inputs

    def first_inputs(self) -> list[Tensor]:
        """Run the model without its blocks on every batch; return what reaches the first block, and keep all calls."""
        if not self._batches:
            return []
        self._returns_tuple = self._probe()
        hidden = []
        for batch in self._batches:
            record = _Recording()
            stand_ins = _stand_ins(self._modules(), record, self._returns_tuple)
            with exchanged(self.source.model, self.outside), stand_ins, torch.no_grad():
                self.source.model.base_model(input_ids=batch, use_cache=False)
            if record.hidden is None:
                raise RuntimeError(f"{self.source.block_names[0]} is not called by the model's forward pass")
            self._calls.setdefault(tuple(batch.shape), [self._to_device(call) for call in record.calls])
            hidden.append(self.fabric.to_device(record.hidden))
        return hidden

    def _probe(self) -> bool:
        """Learn from a real call whether blocks return a tuple or the hidden states alone."""
        record, first = _Recording(), self._modules()[0]
        with _stand_ins([first], record, stop=True), torch.no_grad(), suppress(_Reached):
            self.source.model.base_model(input_ids=self._batches[0][:1], use_cache=False)
        block = self.source.load_block(0, self.fabric.device)
        args, kwargs = self._to_device(record.calls[0])
        with torch.no_grad():
            output = block.module(self.fabric.to_device(record.hidden), *args, **kwargs)
        self.source.release_block(0)
        return isinstance(output, tuple)

    def _modules(self) -> list[nn.Module]:
        return [self.source.model.get_submodule(name) for name in self.source.block_names]

    def _to_device(self, call: _Call) -> _Call:
        moved: _Call = self.fabric.to_device(call)
        return moved

    def logits(self, tokens: int | None = None) -> Tensor:
        """Return the logits ``[1, tokens, vocabulary]`` after the whole walk, in its precision.

        They are those of this rank's first sample, of all of it or of its first ``tokens``; and only of the last of
        them, where the family can do that: all would be the largest tensor of a run.
        """
        keeps = "logits_to_keep" in signature(self.source.model.forward).parameters
        few = {"logits_to_keep": _TOKENS} if keeps else {}
        with torch.no_grad():
            output = self._run_around(self._batches[0][:1, :tokens], self.last_hidden[0][:1, :tokens], **few)
        logits: Tensor = output.logits.cpu().float()
        return logits


@dataclass(eq=False)
class _Recording:
    hidden: Tensor | None = None
    calls: list[_Call] = field(default_factory=list)


class _Reached(Exception):
    """The first block was reached; the rest of the forward pass is not needed."""


@contextmanager
def _stand_ins(
    modules: Sequence[nn.Module],
    record: _Recording,
    returns_tuple: bool = False,
    *,
    stop: bool = False,
    final: Tensor | None = None,
) -> Iterator[None]:
    """Replace the blocks' forward by one that records its call and hands its input on (at the end: ``final``)."""

    def stand_in(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = _split(args, kwargs)
            record.calls.append((args, kwargs))
            record.hidden = hidden if index == 0 else record.hidden
            if stop:
                raise _Reached
            output = final.to(hidden) if final is not None and index == len(modules) - 1 else hidden
            return (output,) if returns_tuple else output

        return forward

    for index, module in enumerate(modules):
        module.forward = stand_in(index)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class's own method shows again


def _split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Separate the hidden states from the other arguments of a block's call."""
    others = dict(kwargs)
    if args:
        return args[0], tuple(args[1:]), others
    return others.pop("hidden_states"), (), others
