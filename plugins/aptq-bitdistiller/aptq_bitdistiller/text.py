"""The text that a student is trained on: what its teacher writes when it goes on from calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aptq.api import AptqError
from aptq.files import write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How much text, and where it is from."""

    generate: bool = True  # the teacher continues prompts; false: calibration text as it is
    samples: int = 128
    length: int = 256  # tokens of a sample, its prompt included
    prompt_length: int = 32
    temperature: float = 0.7  # the paper's
    top_p: float = 1.0
    batch_size: int = 32  # prompts that are continued side by side
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2 or self.batch_size < 1:
            raise AptqError(
                f"text.samples={self.samples}, text.length={self.length} and text.batch_size={self.batch_size} are not "
                "allowed; use samples and batches of 1 or more, of 2 tokens or more."
            )
        if self.generate and not 1 <= self.prompt_length < self.length:
            raise AptqError(
                f"text.prompt_length={self.prompt_length} is not allowed; use 1 to text.length - 1 ({self.length - 1})."
            )
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise AptqError(
                f"text.temperature={self.temperature} and text.top_p={self.top_p} are not allowed; use a temperature "
                "above 0 and 0 < top_p <= 1."
            )


@dataclass(frozen=True, eq=False)
class Text:
    """Samples to train on."""

    tokens: Tensor  # [samples, length], int64
    mask: Tensor  # [samples, length], bool: False behind the end of a sample
    prompt_length: int  # leading tokens that are given, not written by the teacher

    def predicted(self) -> Tensor:
        """Return which predictions count, ``[samples, length - 1]``: those of tokens that are there."""
        return self.mask[:, 1:]

    def written(self) -> Tensor:
        """Return which predictions are of the teacher's own tokens, ``[samples, length - 1]``."""
        places = torch.arange(1, self.tokens.shape[1], device=self.tokens.device)
        return self.predicted() & (places >= self.prompt_length)


def generated(
    model: PreTrainedModel,
    prompts: Tensor,
    settings: TextSettings,
    end: int | None,
    folder: Path,
    advance: Callable[[int], None],
) -> Text:
    """Let the teacher continue prompts, a batch after the other; batches that are in the folder are not made again.

    Args:
        model: the teacher, in eval mode.
        prompts: ``[samples, prompt_length]``, int64.
        settings: how to sample; the same seed gives the same text on the same machine.
        end: token that ends a sample; None where the model has none.
        folder: where batches are kept, named by all that they depend on.
        advance: told how many samples are there.
    """
    batches = []
    for index, batch in enumerate(prompts.split(settings.batch_size)):
        path = folder / f"{index:05d}.safetensors"
        tokens = _read(path)
        if tokens is None:
            tokens = _continue(model, batch, settings, end, settings.seed + index)
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {"tokens": tokens}, what="the teacher's text")
        batches.append(tokens)
        advance(sum(map(len, batches)))
    tokens = torch.cat(batches)
    return Text(tokens, _until_end(tokens, end, settings.prompt_length), settings.prompt_length)


def given(samples: Tensor) -> Text:
    """Return samples ``[samples, length]`` as they are: the whole of each counts as written."""
    return Text(samples, torch.ones_like(samples, dtype=torch.bool), prompt_length=0)


def order(count: int, seed: int) -> Iterator[int]:
    """Give the indices of ``count`` samples without end: every pass over them in another random order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _continue(model: PreTrainedModel, prompts: Tensor, settings: TextSettings, end: int | None, seed: int) -> Tensor:
    """Return samples ``[batch, length]``, int64; what lies behind the end of one is its end token."""
    fill = 0 if end is None else end
    chosen: dict[str, Any] = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
    ids = prompts.to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        output = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=settings.length - ids.shape[1],
            top_k=0,
            eos_token_id=end,
            pad_token_id=fill,
            **chosen,
        )
    samples = torch.full((len(prompts), settings.length), fill, dtype=torch.int64)
    samples[:, : output.shape[1]] = output.cpu()
    return samples


def _until_end(tokens: Tensor, end: int | None, prompt_length: int) -> Tensor:
    """Return a mask ``[samples, length]`` that ends with the first end token behind the prompt."""
    ends = torch.zeros_like(tokens, dtype=torch.bool) if end is None else tokens == end
    ends[:, :prompt_length] = False
    before = ends.cumsum(1) - ends.long()
    return before == 0


def _read(path: Path) -> Tensor | None:
    try:
        return load_file(path)["tokens"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
