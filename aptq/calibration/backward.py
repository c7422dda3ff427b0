"""The loss's gradients on their way back through the model, a block at a time.

One run of the full-precision model forwards and one backwards: what every block was fed lies on disk in between,
``blocks * samples * tokens * width`` numbers, and is removed block by block on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aptq.api import AptqError, Block, BlockInputs, Callback
from aptq.calibration.distribute import all_finite
from aptq.calibration.walk import Walk
from aptq.files import write_tensors

LOSSES: Mapping[str | None, Sequence[str]] = {"data": ("data",), "model": ("model",), "both": ("model", "data")}
"""What a tap may ask for as labels, and the losses that are differentiated for it: see ``token_loss``."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What passed through a module on one batch."""

    inputs: Tensor  # the first argument
    gradient: Tensor  # of each loss, by the module's output: [losses, *its shape]


class Tap(Protocol):
    """Who wants the gradients at the outputs of a block's modules."""

    @property
    def labels(self) -> str | None:
        """What the loss compares predictions with; see ``LOSSES``."""

    @property
    def seed(self) -> int:
        """Of what is drawn."""

    def modules(self, block: Block) -> Iterable[str]:
        """Return the full names of a block's modules that matter; raise ``AptqError`` if it cannot be measured so."""

    def begin(self, block: Block) -> None:
        """Take up a block, before any gradient: its weights are on the device."""

    def add(self, seen: Mapping[str, Seen], samples: Sequence[int]) -> None:
        """Take what passed through the modules that one batch called, by full name."""

    def finish(self) -> None:
        """Keep what the block gave: it is not taken up again, even if the pass is interrupted now."""


@dataclass(frozen=True, kw_only=True)
class BackwardPass:
    """Both runs over all blocks; interrupted, they go on at the block that the way back had come to."""

    walk: Walk
    tap: Tap
    folder: Path
    callbacks: Callback
    stage: str

    def run(self) -> None:
        """Run, or go on.

        Raises:
            AptqError: the tap refuses a block, or gradients are not finite.
        """
        walk, blocks = self.walk, len(self.walk.source.block_names)
        self.folder.mkdir(parents=True, exist_ok=True)
        start = self.reached()
        if start is None:
            start = blocks
            self._run_forwards()
            self._turn()
        else:
            walk.first_inputs()  # what the blocks are called with besides their hidden states
        for index in reversed(range(start)):
            detail = f"back to {walk.source.block_names[index]}"
            self.callbacks.on_advance(stage=self.stage, done=2 * blocks - index - 1, detail=detail)
            self._run_backwards(walk.source.load_block(index, walk.fabric.device))
            walk.source.release_block(index)
            self.callbacks.on_block_end(stage=self.stage, index=2 * blocks - index - 1, metrics={})
        self._path("cotangents", 0).unlink()

    def reached(self) -> int | None:
        """Return how many blocks an interrupted pass had not come back through; None where there was none."""
        ends = range(len(self.walk.source.block_names) + 1)
        return next((index for index in ends if self._path("cotangents", index).exists()), None)

    def forget(self) -> None:
        """Begin anew next time."""
        for path in self.folder.glob(f"*-{self.walk.fabric.global_rank}-*.safetensors"):
            if path.name.startswith(("cotangents", "hidden")):
                path.unlink()

    def _path(self, what: str, index: int) -> Path:
        return self.folder / f"{what}-{self.walk.fabric.global_rank}-{index:04d}.safetensors"

    def _run_forwards(self) -> None:
        """Run all blocks; keep what each was fed."""
        for step in self.walk.blocks():
            index = step.block.index
            self.callbacks.on_advance(stage=self.stage, done=index, detail=step.block.name)
            self.tap.modules(step.block)  # what it refuses, it shall refuse on the way out and not back
            _write(self._path("hidden", index), [batch.hidden for batch in step.inputs])
            step.run()
            self.callbacks.on_block_end(stage=self.stage, index=index, metrics={})

    def _turn(self) -> None:
        """Differentiate the loss by what the last block gives, and by what the head gives if that is quantized."""
        walk, tap = self.walk, self.tap
        head = None if walk.source.head_name is None else walk.source.load_head()
        wanted = [] if head is None else list(tap.modules(head))
        if head is not None:
            tap.begin(head)
        cotangents = []
        for number, hidden in enumerate(walk.last_hidden):
            final = hidden.detach().requires_grad_()
            gradients = hidden.new_zeros(len(LOSSES[tap.labels]), *hidden.shape)
            watched = _Watched(walk.source.model, wanted)
            with torch.enable_grad(), watched:
                for place, (sample, tokens, logits) in enumerate(walk.finish(number, final)):
                    losses = [
                        (token_loss(logits, tokens, each, (tap.seed, sample)), None) for each in LOSSES[tap.labels]
                    ]
                    whole, seen = watched.differentiate(losses, final)
                    gradients[:, place] = whole[:, place]
                    if head is not None:
                        tap.add(seen, [sample])
            cotangents.append(gradients)
        if head is not None:
            tap.finish()
        _write(self._path("cotangents", len(walk.source.block_names)), cotangents)

    def _run_backwards(self, block: Block) -> None:
        """Take the cotangents of a block's outputs back to its inputs."""
        walk, index = self.walk, block.index
        self.tap.begin(block)
        wanted = {name: name.removeprefix(f"{block.name}.") for name in self.tap.modules(block)}
        following = _read(self._path("cotangents", index + 1), walk.fabric.device)
        cotangents = []
        batches = walk.inputs(index, _read(self._path("hidden", index), walk.fabric.device))
        for batch, behind in zip(batches, following, strict=True):
            gradients, seen = self._differentiate(batch, block.module, wanted, behind)
            if not all_finite(gradients):
                raise AptqError(
                    f"The loss has gradients of NaN or Inf at {block.name}. If the model is stored in float16, try "
                    "model.dtype=bfloat16 or float32."
                )
            cotangents.append(gradients)
            self.tap.add(seen, batch.samples)
        self.tap.finish()
        _write(self._path("cotangents", index), cotangents)
        self._path("cotangents", index + 1).unlink()
        self._path("hidden", index).unlink()

    def _differentiate(
        self, batch: BlockInputs, module: nn.Module, wanted: Mapping[str, str], cotangents: Tensor
    ) -> tuple[Tensor, dict[str, Seen]]:
        batch.hidden.requires_grad_()
        watched = _Watched(module, wanted.values())
        with torch.enable_grad(), self.walk.autocast(), watched:
            output = batch.run(module)
        gradients, seen = watched.differentiate([(output, each) for each in cotangents], batch.hidden)
        return gradients, {name: seen[short] for name, short in wanted.items() if short in seen}


def token_loss(logits: Tensor, tokens: Tensor, labels: str, key: tuple[int, int]) -> Tensor:
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


class _Watched:
    """Keeps what modules are called with and return while the context lasts."""

    def __init__(self, root: nn.Module, names: Iterable[str]) -> None:
        self._root, self._names = root, list(names)
        self._found: dict[str, tuple[Tensor, Tensor]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> None:
        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                del module
                inputs = args[0].detach() if args else torch.empty(0)
                self._found[name] = inputs, output[0] if isinstance(output, tuple) else output

            return hook

        for name in self._names:
            handle = self._root.get_submodule(name).register_forward_hook(keep(name))
            self._stack.callback(handle.remove)

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def differentiate(self, ends: Sequence[tuple[Tensor, Tensor | None]], by: Tensor) -> tuple[Tensor, dict[str, Seen]]:
        """Differentiate by a tensor, and by what the modules have returned since the last time.

        Args:
            ends: what is differentiated, each with its cotangent (None for a scalar); of one graph.
            by: the tensor.

        Returns:
            the gradients ``[ends, *by's shape]``, and what was seen of each module that was called.
        """
        found, self._found = self._found, {}
        wanted = [by, *(returned for _, returned in found.values())]
        rows = [
            torch.autograd.grad(end, wanted, cotangent, retain_graph=number + 1 < len(ends))
            for number, (end, cotangent) in enumerate(ends)
        ]
        gradients = [torch.stack(each) for each in zip(*rows, strict=True)]
        pairs = zip(found.items(), gradients[1:], strict=True)
        return gradients[0], {name: Seen(inputs, gradient) for (name, (inputs, _)), gradient in pairs}


def _write(path: Path, batches: Sequence[Tensor]) -> None:
    write_tensors(path, {str(number): batch for number, batch in enumerate(batches)}, what="activations")


def _read(path: Path, device: torch.device) -> list[Tensor]:
    tensors = load_file(path, device=str(device))
    return [tensors[str(number)] for number in range(len(tensors))]
