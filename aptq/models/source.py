"""A model opened for quantization: its structure at once, its blocks one at a time."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from aptq.api import Block, Layer
from aptq.errors import AptqError
from aptq.models.embedding import find_embedding
from aptq.models.load import ModelFiles, find_files, load_config
from aptq.models.memory import trim
from aptq.models.opening import Opened, assign, from_pretrained, open_resident, open_streamed
from aptq.models.structure import LinearLayer, apply_skip, find_blocks, find_layers, has_experts, linear_names
from aptq.settings import ModelSettings

__all__ = ["ModelSource", "open_model"]

_log = logging.getLogger(__name__)


class ModelSource:
    """A model opened for quantization; made by ``open_model``.

    ``model`` is in eval mode, without gradients, on the CPU; its mixtures of experts are taken apart
    (``unfuse_experts``). When ``streamed``, its blocks' tensors are on ``meta`` while they are not loaded; otherwise
    ``resident_reason`` says why they are all in memory.
    """

    def __init__(
        self,
        settings: ModelSettings,
        files: ModelFiles,
        stored_config: PreTrainedConfig,
        opened: Opened,
        tokenizer: Tokenizer,
    ) -> None:
        self._settings, self._files, self._stored_config = settings, files, stored_config
        self._store, self._tied = opened.store, opened.tied
        self.model, self.resident_reason = opened.model, opened.resident_reason
        self.streamed = opened.resident_reason is None
        self.tokenizer = tokenizer
        self.config: PreTrainedConfig = self.model.config
        self.generation_config: GenerationConfig | None = self.model.generation_config
        self.dtype: torch.dtype = self.model.dtype
        self.num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        blocks = find_blocks(self.model)
        self.block_names = tuple(blocks)
        self._blocks = tuple(blocks.values())
        self._head = self._find_head() if settings.quantize_head else None
        self._layers = self._name_layers(blocks)
        if self._head is not None and not self._layers[self._head.name]:  # model.skip names it
            self._head = None
        wanted = settings.quantize_embeddings is not None
        self.embedding = find_embedding(self.model, set(self.layer_shapes())) if wanted else None

    def _name_layers(self, blocks: Mapping[str, nn.Module]) -> dict[str, dict[str, Layer]]:
        of_block = {name: find_layers(block, name) for name, block in blocks.items()}
        layers = {name: layer for found in of_block.values() for name, layer in found.items()}
        if not layers:
            raise AptqError(f"{self._settings.path}: no linear layers found in the blocks, so nothing can be quantized")
        if self._head is not None:
            of_block[self._head.name] = {self._head.name: self._head}
            layers[self._head.name] = self._head
        others = [name for name in linear_names(self.model) if name not in layers]
        kept = apply_skip(layers, others, self._settings.skip)
        return {
            block: {name: layer for name, layer in found.items() if name in kept} for block, found in of_block.items()
        }

    def _find_head(self) -> LinearLayer:
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        names = {module: name for name, module in self.model.named_modules()}
        if not isinstance(head, nn.Linear) or head not in names:
            raise AptqError(
                f"model.quantize_head: {type(self.model).__name__} has no linear head; leave model.quantize_head out"
            )
        self._head_weight = head.weight  # of the embedding too, where they are tied
        return LinearLayer(names[head], head)

    @property
    def num_steps(self) -> int:
        """How many steps a walk takes: one a block, and one for the head where it is to be quantized."""
        return len(self.block_names) + (self._head is not None)

    @property
    def head_name(self) -> str | None:
        """Name of the head, when it is to be quantized."""
        return None if self._head is None else self._head.name

    @property
    def has_experts(self) -> bool:
        """Whether some block sends each token through a few of many layers."""
        return any(has_experts(block) for block in self._blocks)

    def load_head(self) -> Block:
        """Return the head as the last block, with a weight of its own: a tied embedding stays as it is."""
        if self._head is None:
            raise RuntimeError("the head is not to be quantized")
        name = self._head.name
        self._head.module.weight = nn.Parameter(self._head_weight.detach().clone(), requires_grad=False)
        return Block(index=len(self.block_names), name=name, module=self._head.module, layers=self._layers[name])

    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """Return ``(out, in)`` of every layer to quantize, by full name, in the order of the model."""
        return {name: layer.shape for layers in self._layers.values() for name, layer in layers.items()}

    def layers_by_step(self) -> list[list[str]]:
        """Return the names of the layers to quantize of each step of a walk: every block, and the head if it is one."""
        steps = (*self.block_names, *(() if self._head is None else (self._head.name,)))
        return [list(self._layers[name]) for name in steps]

    @property
    def other_bytes(self) -> int:
        """Bytes of the parameters that stay as they are; of a tied head, those of the embedding.

        These are all but the weights of ``layer_shapes``, and the table of the embedding where that is to be quantized.
        """
        layers = (layer for name, found in self._layers.items() if name in self.block_names for layer in found.values())
        quantized = sum(layer.shape[0] * layer.shape[1] * layer.weight().element_size() for layer in layers)
        if self._head is not None and f"{self._head.name}.weight" not in self._tied:
            quantized += self._head_weight.numel() * self._head_weight.element_size()
        return self.num_bytes - quantized - (0 if self.embedding is None else self.embedding.num_bytes)

    def load_block(self, index: int, device: torch.device | str) -> Block:
        """Put a block's original tensors on a device and return it.

        The tensors are copies: what is written to them is gone when the block is released or loaded again.
        """
        name, module = self.block_names[index], self._blocks[index]
        kept = self._kept(name, module)
        for key, tensor in self._store.read(kept):
            assign(self.model, key, tensor.to(device, copy=True))
        self._move_rest(name, module, set(kept), device)
        return Block(index=index, name=name, module=module, layers=self._layers[name])

    def release_block(self, index: int) -> None:
        """Take a block off its device: to ``meta`` when streamed, else to its original tensors on the CPU."""
        name, module = self.block_names[index], self._blocks[index]
        kept = self._kept(name, module)
        for key in kept:
            assign(self.model, key, self._store.placeholder(key))
        self._move_rest(name, module, set(kept), "cpu")
        trim()

    def _kept(self, name: str, module: nn.Module) -> list[str]:
        """Return the tensors of a block that the store has."""
        return [key for key in (f"{name}.{child}" for child in module.state_dict()) if key in self._store]

    def _move_rest(self, name: str, module: nn.Module, kept: set[str], device: torch.device | str) -> None:
        """Move the buffers that no checkpoint holds, such as rotary frequencies."""
        for child, buffer in list(module.named_buffers()):
            if f"{name}.{child}" not in kept:
                assign(module, child, buffer.to(device))

    def other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Give every tensor of the state dict, as it was, but the weights of what is quantized.

        Those are the layers in ``layer_shapes``, and the embedding if it is to be quantized. Names are those of
        ``model.state_dict()``; names that share another tensor (a tied head) are left out. Blocks are read one after
        the other and need not be loaded.
        """
        quantized = (*self.layer_shapes(), *(() if self.embedding is None else (self.embedding.name,)))
        weights = {f"{name}.weight" for name in quantized}
        blocks = tuple(f"{name}." for name in self.block_names)
        for name, tensor in self.model.state_dict().items():
            if not name.startswith(blocks) and name not in self._tied | weights:
                yield name, tensor
        for block, module in zip(self.block_names, self._blocks, strict=True):
            kept = self._kept(block, module)
            for name, tensor in self._store.read(key for key in kept if key not in weights):
                yield name, tensor.clone()
            rest = ((f"{block}.{child}", tensor) for child, tensor in module.state_dict().items())
            yield from ((name, tensor.cpu()) for name, tensor in rest if name not in kept)

    def load_full(self) -> PreTrainedModel:
        """Load the full-precision model from disk once more, whole, on the CPU; it shares nothing with ``model``."""
        return from_pretrained(self._settings, self._files, deepcopy(self._stored_config), self.dtype)

    def fingerprint(self) -> str:
        """Return a digest of the config, the dtype and the contents of all weight files."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(str(self.dtype).encode(), digest_size=32)
        config = self._files.folder / "config.json"
        files = [config, *self._files.weights] if self._files.kind != "gguf" else self._files.weights
        for path in files:
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "blake2b").digest())
        return digest.hexdigest()


def open_model(settings: ModelSettings) -> ModelSource:
    """Open a model for quantization: find it, check it, and name its blocks and layers.

    Only what lies outside the blocks is read, unless the checkpoint has to be converted by transformers as a whole.

    Raises:
        AptqError: what was given is no model that can be quantized; the message says why and what to do.
    """
    files = find_files(settings)
    config = load_config(files, settings)
    tokenizer = _load_tokenizer(settings, files)
    # Building a model writes to its config, and reading one from a GGUF takes seconds: copies are handed out.
    opened = open_streamed(settings, files, deepcopy(config)) if files.kind == "safetensors" else files.kind
    if not isinstance(opened, Opened):
        reasons = {
            "gguf": "a GGUF is dequantized as a whole by transformers",
            "pickle": "a pickle can only be read as a whole",
        }
        reason = reasons.get(opened, opened)
        _log.info("The whole model is kept in memory: %s", reason)
        opened = open_resident(settings, files, deepcopy(config), reason)
    path = files.folder / "generation_config.json"
    if path.is_file():
        opened.model.generation_config = GenerationConfig.from_pretrained(files.folder)
    return ModelSource(settings, files, config, opened, tokenizer)


def _load_tokenizer(settings: ModelSettings, files: ModelFiles) -> Tokenizer:
    options: dict[str, Any] = {"gguf_file": files.gguf_file} if files.gguf_file else {}
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            files.folder, trust_remote_code=settings.trust_remote_code, **options
        )
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise AptqError(
            f"{settings.path}: no tokenizer could be loaded from {files.folder} ({error}). "
            "The folder must hold tokenizer.json, or the tokenizer files of its family"
        ) from error
    return tokenizer
