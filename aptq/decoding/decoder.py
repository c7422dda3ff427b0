"""``generate`` with a captured step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StaticCache, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from aptq.decoding.capture import Traced, trace
from aptq.errors import AptqError

_TRACED, _COMPILED = 1e-2, 1e-1
"""How far logits of a step may be from the model's own, relative to the largest: traced operators are the same, and
compiled ones round otherwise, which activations of few bits make much of."""


class Decoder:
    """Generate by a step of the model that is captured and compiled once.

    A step of a small model is mostly Python; without it a packed model decodes as fast as its kernels. Give it to the
    model's own ``generate``, which then samples, stops and streams as always::

        decoder = Decoder(model, max_length=512)
        model.generate(**inputs, custom_generate=decoder, max_new_tokens=100)

    The first call, or ``prepare``, takes a minute for thirty blocks. Every step attends to all ``max_length``
    positions, so that it should not be much larger than what is used.

    Args:
        model: loaded with ``aptq.load`` or transformers, on one device.
        max_length: tokens of a prompt and what is generated, at most.
        batch_size: sequences at once, all of one length.

    Raises:
        AptqError: a size is not positive, or the model is on no device or several.
    """

    def __init__(self, model: PreTrainedModel, *, max_length: int, batch_size: int = 1) -> None:
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if value < 1:
                raise AptqError(f"{name} is {value}; it has to be at least 1.")
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        if len(devices) != 1 or next(iter(devices)).type == "meta":
            told = ", ".join(sorted(map(str, devices)))
            raise AptqError(f"The model is on {told}; a step is captured on one device that has its weights.")
        self.model = model
        self.max_length, self.batch_size = max_length, batch_size
        self._device = next(iter(devices))
        self._cache = StaticCache(config=model.config, max_cache_len=max_length)
        self._takes = inspect.signature(model.forward).parameters
        self._step: Traced | None = None
        self._used = 0

    def prepare(self) -> None:
        """Capture and compile the step, unless that was done.

        Raises:
            AptqError: the model has a cache that is not static, or a step cannot be captured or does not give what the
                model does (see ``trace``).
        """
        if self._step is None:
            if any(getattr(layer, "is_sliding", False) for layer in self._cache.layers):
                raise AptqError(
                    "The model attends to a sliding window, whose cache counts in Python, so that a step of it cannot "
                    "be captured. Decode with the model's own generate()."
                )
            tokens = torch.zeros(self.batch_size, 1, dtype=torch.long, device=self._device)
            self._restart()
            self._logits(tokens)  # the cache is made when it is first used
            self._restart()
            step = trace(self._logits, tokens)
            self._check(step, _TRACED, "the model keeps something between steps that is not in its cache")
            step.compile(tokens)
            self._check(step, _COMPILED, "it was compiled wrongly")
            self._step = step

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Begin with a prompt ``[batch, length]``; return the logits ``[batch, vocabulary]`` of what comes next.

        Raises:
            AptqError: there are more or fewer sequences, or more tokens, than the decoder is made for.
        """
        if input_ids.shape[0] != self.batch_size:
            raise AptqError(
                f"{input_ids.shape[0]} sequences were given to a decoder of {self.batch_size}; make one with "
                f"batch_size={input_ids.shape[0]}."
            )
        self._use(input_ids.shape[1], at=0)
        self.prepare()
        self._restart()
        return self._logits(input_ids)

    def step(self, tokens: Tensor) -> Tensor:
        """Go on with one token of each sequence, ``[batch, 1]``; return the logits ``[batch, vocabulary]`` of the next.

        Raises:
            AptqError: all of ``max_length`` is used, or there was no prompt.
        """
        if self._step is None:
            raise AptqError("There is no prompt yet: call prefill first.")
        self._use(1, at=self._used)
        return self._step(tokens)

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        stream: BaseStreamer | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Decode as ``generate(custom_generate=...)`` asks for: greedily or by sampling; return all tokens.

        ``generate(stream=...)`` is what its ``streamer`` is elsewhere, which transformers keeps from others' decoding.

        Raises:
            AptqError: what is asked for is not that, the model is another, sequences are padded, or a cache is given.
        """
        self._check_request(model, generation_config, inputs)
        padding = generation_config._pad_token_tensor
        going = torch.ones(self.batch_size, dtype=torch.bool, device=input_ids.device)
        if stream is not None:
            stream.put(input_ids.cpu())  # type: ignore[no-untyped-call]
        logits = self.prefill(input_ids)
        while True:
            scores = logits_processor(input_ids, logits.float())  # type: ignore[arg-type]  # LongTensor is no dtype
            if generation_config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), 1)
            else:
                tokens = scores.argmax(-1, keepdim=True)
            if padding is not None:
                tokens = torch.where(going[:, None], tokens, padding)
            input_ids = torch.cat([input_ids, tokens], dim=-1)
            if stream is not None:
                stream.put(tokens[:, 0].cpu())  # type: ignore[no-untyped-call]
            going &= ~stopping_criteria(input_ids, None)
            if not going.any():
                break
            logits = self.step(tokens)
        if stream is not None:
            stream.end()  # type: ignore[no-untyped-call]
        return input_ids

    def _check_request(
        self, model: PreTrainedModel, generation_config: GenerationConfig, inputs: Mapping[str, Any]
    ) -> None:
        if model is not self.model:
            raise AptqError("The decoder was made for another model; make one for this.")
        if generation_config.num_beams != 1:
            raise AptqError(f"num_beams is {generation_config.num_beams}; a decoder decodes greedily or by sampling.")
        if generation_config.return_dict_in_generate:
            raise AptqError("return_dict_in_generate is set; a decoder returns tokens alone.")
        if (most := generation_config.max_length) > self.max_length:
            raise AptqError(
                f"Up to {most} tokens are asked for, the prompt's among them, and the decoder's max_length is "
                f"{self.max_length}; make one with more room, or ask for less (max_new_tokens)."
            )
        mask, cache = inputs.get("attention_mask"), inputs.get("past_key_values")
        if mask is not None and not mask.all():
            raise AptqError("Some sequences are padded; a decoder takes sequences of one length.")
        if cache is not None and cache.get_seq_length() > 0:
            raise AptqError("A cache with tokens was given; a decoder has its own: give it the whole prompt.")

    def _use(self, tokens: int, at: int) -> None:
        if at + tokens > self.max_length:
            raise AptqError(
                f"{at + tokens} tokens are more than the decoder's max_length of {self.max_length}; make one with more "
                "room, or generate less."
            )
        self._used = at + tokens

    @torch.no_grad()
    def _logits(self, tokens: Tensor) -> Tensor:
        """Return the model's own logits ``[batch, vocabulary]`` behind the last of some tokens ``[batch, length]``."""
        options: dict[str, Any] = {"past_key_values": self._cache}
        if "position_ids" in self._takes:  # models may count them in Python otherwise
            at = torch.arange(tokens.shape[1], device=self._device) + self._cache.get_seq_length()
            options["position_ids"] = at.expand(tokens.shape)
        if "logits_to_keep" in self._takes:
            options["logits_to_keep"] = 1
        logits: Tensor = self.model(tokens, **options).logits
        return logits[:, -1]

    def _restart(self) -> None:
        self._cache.reset()  # type: ignore[no-untyped-call]

    def _check(self, step: Traced, tolerance: float, why: str) -> None:
        """Compare two steps with the model's own: one may have kept a value that another step has changed."""
        size = self.model.config.get_text_config().vocab_size
        first, *others = torch.arange(3, device=self._device) * 7 % size
        tokens = [each.expand(self.batch_size, 1).contiguous() for each in (first, *others)]
        found = []
        for run in (self._logits, step):
            self._restart()
            self._logits(tokens[0])
            found.append([run(each) for each in tokens[1 : self.max_length]])
        for own, captured in zip(*found, strict=True):
            error = float((own - captured).abs().max() / own.abs().max())
            if not error <= tolerance:
                raise AptqError(
                    f"The captured step gives other logits than the model, off by {error:.1%} of the largest: {why}. "
                    "Decode with its own generate()."
                )
