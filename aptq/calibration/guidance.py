"""How much the model's loss minds an error at a module's output, token by token.

One run of the full-precision model forwards and one backwards over all calibration samples, a block at a time: what
every block was fed lies on disk in between, ``blocks * samples * tokens * width`` numbers, and is removed block by
block on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aptq.api import AptqError, Block, Callback, GuidedEstimator
from aptq.calibration.distribute import all_finite
from aptq.calibration.walk import Walk
from aptq.files import write_tensors

STAGE = "gradients"


@dataclass(frozen=True)
class Guidance:
    """The mean squares of gradients on disk, one file a block: what ``Block.guidance`` is filled with."""

    folder: Path
    rank: int
    device: torch.device

    def __call__(self, index: int) -> dict[str, Tensor]:
        """Return those of a block: ``[all samples, tokens, groups]``, float32, by module."""
        return load_file(self.path("squares", index), device=str(self.device))

    def path(self, what: str, index: int) -> Path:
        """Return where a block's tensors are: its "squares", the "hidden" states or the "cotangents" of its inputs."""
        return self.folder / f"{what}-{self.rank}-{index:04d}.safetensors"


def measure_guidance(walk: Walk, estimator: GuidedEstimator, folder: Path, callbacks: Callback) -> Guidance:
    """Return what an estimator asked for, from ``folder`` where it is there already.

    An interrupted run goes on at the block that the backward pass had come to, or begins anew if there was none.

    Raises:
        AptqError: the estimator cannot measure one of the blocks, or gradients are not finite.
    """
    guidance = Guidance(folder, walk.fabric.global_rank, walk.fabric.device)
    steps, blocks = walk.source.num_steps, len(walk.source.block_names)
    if all(guidance.path("squares", index).exists() for index in range(steps)):
        return guidance
    folder.mkdir(parents=True, exist_ok=True)
    reached = [index for index in range(blocks + 1) if guidance.path("cotangents", index).exists()]
    if reached:
        walk.first_inputs()  # what the blocks are called with besides their hidden states
    else:
        reached = [blocks]
        _run_forwards(walk, estimator, guidance, callbacks)
        _start_backwards(walk, estimator, guidance)
    for index in reversed(range(reached[0])):
        detail = f"back to {walk.source.block_names[index]}"
        callbacks.on_advance(stage=STAGE, done=2 * blocks - index - 1, detail=detail)
        block = walk.source.load_block(index, walk.fabric.device)
        _run_backwards(walk, block, estimator, guidance)
        walk.source.release_block(index)
        callbacks.on_block_end(stage=STAGE, index=2 * blocks - index - 1, metrics={})
    guidance.path("cotangents", 0).unlink()
    return guidance


def _run_forwards(walk: Walk, estimator: GuidedEstimator, guidance: Guidance, callbacks: Callback) -> None:
    """Run all blocks; keep what each was fed."""
    for step in walk.blocks():
        index = step.block.index
        callbacks.on_advance(stage=STAGE, done=index, detail=step.block.name)
        estimator.guides(step.block)  # what it refuses, it shall refuse on the way out and not back
        _write(guidance.path("hidden", index), [batch.hidden for batch in step.inputs])
        step.run()
        callbacks.on_block_end(stage=STAGE, index=index, metrics={})


def _start_backwards(walk: Walk, estimator: GuidedEstimator, guidance: Guidance) -> None:
    """Differentiate the loss by what the last block gives, and by what the head gives if that is to be quantized."""
    head = None if walk.source.head_name is None else walk.source.load_head()
    wanted = {} if head is None else dict(estimator.guides(head))
    squares = _Squares(wanted, len(walk.samples))
    cotangents = []
    for number, hidden in enumerate(walk.last_hidden):
        final = hidden.detach().requires_grad_()
        gradient = torch.zeros_like(hidden)
        outputs = _Outputs(walk.source.model, wanted)
        with torch.enable_grad(), outputs:
            for place, (sample, tokens, logits) in enumerate(walk.finish(number, final)):
                loss = token_loss(logits, tokens, estimator.labels, (estimator.seed, sample))
                whole, *found = torch.autograd.grad(loss, [final, *outputs.take()])
                gradient[place] = whole[place]
                squares.add(found, [sample])
        cotangents.append(gradient)
    if head is not None:
        squares.write(guidance.path("squares", head.index))
    _write(guidance.path("cotangents", len(walk.source.block_names)), cotangents)


def _run_backwards(walk: Walk, block: Block, estimator: GuidedEstimator, guidance: Guidance) -> None:
    """Take the cotangents of a block's outputs back to its inputs, and note the squares on the way."""
    wanted = dict(estimator.guides(block))
    squares = _Squares(wanted, len(walk.samples))
    hidden = _read(guidance.path("hidden", block.index), guidance.device)
    following = guidance.path("cotangents", block.index + 1)
    cotangents = []
    batches = walk.inputs(block.index, hidden)
    for batch, cotangent in zip(batches, _read(following, guidance.device), strict=True):
        batch.hidden.requires_grad_()
        outputs = _Outputs(block.module, (name.removeprefix(f"{block.name}.") for name in wanted))
        with torch.enable_grad(), walk.autocast(), outputs:
            output = batch.run(block.module)
        found = torch.autograd.grad(output, [batch.hidden, *outputs.take()], cotangent)
        if not all_finite(found[0]):
            raise AptqError(
                f"The loss has gradients of NaN or Inf at {block.name}. If the model is stored in float16, try "
                "model.dtype=bfloat16 or float32."
            )
        cotangents.append(found[0])
        squares.add(found[1:], batch.samples)
    squares.write(guidance.path("squares", block.index))
    _write(guidance.path("cotangents", block.index), cotangents)
    following.unlink()
    guidance.path("hidden", block.index).unlink()


def token_loss(logits: Tensor, tokens: Tensor, labels: str | None, key: tuple[int, int]) -> Tensor:
    """Return the sum of cross entropies of ``logits [1, tokens, vocabulary]``.

    Args:
        logits: predictions, those of the last token without a label where ``labels`` is "data".
        tokens: ``[1, tokens]``.
        labels: "data" for the tokens that follow, "model" for tokens drawn from the predictions, with which the mean
            square of the gradient is the Fisher information.
        key: seeds what is drawn.
    """
    flat = logits[0].float()
    if labels == "data":
        return nn.functional.cross_entropy(flat[:-1], tokens[0, 1:].to(flat.device), reduction="sum")
    seed, sample = key
    generator = torch.Generator().manual_seed((seed * 1_000_003 + sample) % (2**63 - 1))
    drawn = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(flat, drawn.to(flat.device), reduction="sum")


class _Outputs:
    """Keeps what modules return while the context lasts."""

    def __init__(self, root: nn.Module, names: Iterable[str]) -> None:
        self._root, self._names = root, list(names)
        self._found: dict[str, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> None:
        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                del module, args
                self._found[name] = output[0] if isinstance(output, tuple) else output

            return hook

        for name in self._names:
            handle = self._root.get_submodule(name).register_forward_hook(keep(name))
            self._stack.callback(handle.remove)

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def take(self) -> list[Tensor]:
        """Return the outputs since the last time."""
        missing = [name for name in self._names if name not in self._found]
        if missing:
            raise AptqError(f"{missing[0]} is not called by the model, so the loss has no gradient there.")
        return [self._found.pop(name) for name in self._names]


class _Squares:
    """Mean squares over groups of channels, by module: ``[all samples, tokens, groups]``."""

    def __init__(self, wanted: Mapping[str, int], samples: int) -> None:
        self._wanted, self._samples = wanted, samples
        self._found: dict[str, Tensor] = {}

    def add(self, gradients: Sequence[Tensor], samples: Sequence[int]) -> None:
        """Note the gradients at the modules' outputs ``[samples, tokens, channels]``."""
        for (name, groups), gradient in zip(self._wanted.items(), gradients, strict=True):
            means = gradient.float().unflatten(-1, (groups, -1)).square().mean(-1)
            means = means.reshape(len(samples), -1, groups)  # some modules put samples and tokens in one dimension
            if name not in self._found:
                self._found[name] = means.new_zeros(self._samples, *means.shape[1:])
            self._found[name][list(samples)] = means

    def write(self, path: Path) -> None:
        """Write them; the file appears whole or not at all."""
        write_tensors(path, self._found, what="gradients")


def _write(path: Path, batches: Sequence[Tensor]) -> None:
    write_tensors(path, {str(number): batch for number, batch in enumerate(batches)}, what="activations")


def _read(path: Path, device: torch.device) -> list[Tensor]:
    tensors = load_file(path, device=str(device))
    return [tensors[str(number)] for number in range(len(tensors))]
