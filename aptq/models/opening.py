"""How a model gets its tensors: block by block from disk, or all at once through transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any, Protocol, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from aptq.errors import AptqError
from aptq.models.experts import unfuse_experts
from aptq.models.load import DTYPES, LOADING_ERRORS, ModelFiles
from aptq.models.structure import find_blocks
from aptq.models.weights import Checkpoint, NotStreamable, Recipe, parameter_dtypes, plan_recipes, unfuse_recipes
from aptq.settings import ModelSettings

__all__ = ["Opened", "Store", "assign", "exchanged", "from_pretrained", "open_resident", "open_streamed"]

_log = logging.getLogger(__name__)


class Store(Protocol):
    """Where the original tensors of the blocks are."""

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Give tensors of the model as they were; the caller copies them."""

    def placeholder(self, name: str) -> Tensor:
        """Return what the model holds while the tensor's block is not loaded."""

    def __contains__(self, name: object) -> bool:
        """Whether a tensor is kept here."""


class _OnDisk:
    def __init__(
        self, checkpoint: Checkpoint, recipes: Mapping[str, Recipe], dtypes: Mapping[str, torch.dtype]
    ) -> None:
        self._checkpoint, self._recipes, self._dtypes = checkpoint, recipes, dtypes

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._checkpoint.read({name: self._recipes[name] for name in names}):
            yield name, tensor.to(self._dtypes.get(name, tensor.dtype))

    def placeholder(self, name: str) -> Tensor:
        shape = self._checkpoint.shape(self._recipes[name])
        return torch.empty(shape, dtype=self._dtypes.get(name), device="meta")

    def __contains__(self, name: object) -> bool:
        return name in self._recipes


class _InMemory:
    """Keeps the originals of a resident model, so that a block that was written to comes back clean."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        return ((name, self._tensors[name]) for name in names)

    def placeholder(self, name: str) -> Tensor:
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in a model's place for a parameter or buffer, whatever device was there."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


@contextmanager
def exchanged(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the places of a model's own while the context lasts."""
    own = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)


@dataclass(frozen=True, eq=False)
class Opened:
    """A model whose blocks' tensors are in a store."""

    model: PreTrainedModel
    store: Store
    tied: frozenset[str]  # names that share another tensor
    resident_reason: str | None


def _dtype(settings: ModelSettings, config: PreTrainedConfig, stored: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype to load in; None leaves it to transformers."""
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    named = config.dtype or config.get_text_config().dtype
    dtype = getattr(torch, named) if isinstance(named, str) else named or stored
    if dtype is not None and dtype not in DTYPES.values():
        raise AptqError(
            f"{settings.path} is stored as {dtype}; set model.dtype to one of {', '.join(DTYPES)} to load it as that"
        )
    return dtype


def _attention(settings: ModelSettings, config: PreTrainedConfig) -> str:
    """Return the attention to load with: some families (softcapped logits) have no ``sdpa``."""
    if settings.attn_implementation == "sdpa" and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        if not getattr(family, "_supports_sdpa", True):
            _log.warning("%s has no sdpa attention; eager attention is used", config.model_type)
            return "eager"
    return settings.attn_implementation


def from_pretrained(
    settings: ModelSettings, files: ModelFiles, config: PreTrainedConfig, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Load a whole model on the CPU through transformers; complain of tensors that are missing."""
    options: dict[str, Any] = {"use_safetensors": files.kind == "safetensors", "weights_only": True}
    if files.kind == "gguf":
        options = {"gguf_file": files.gguf_file}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            files.folder,
            config=config,
            dtype=dtype or "auto",
            attn_implementation=_attention(settings, config),
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except UnpicklingError as error:
        raise AptqError(
            f"{settings.path}: the pickled weights hold more than tensors, and nothing else is unpickled. "
            "Convert them to safetensors where you trust them"
        ) from error
    except LOADING_ERRORS as error:
        raise AptqError(f"{settings.path}: transformers cannot load this model: {error}") from error
    model, info = loaded
    _check_complete(settings, info["missing_keys"])
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def _check_complete(settings: ModelSettings, missing: Iterable[str]) -> None:
    names = sorted(missing)
    if names:
        raise AptqError(
            f"{settings.path} lacks {len(names)} tensors of the model that its config.json describes, "
            f"{', '.join(names[:3])} among them. Give a complete checkpoint, or correct the config"
        )


def open_resident(settings: ModelSettings, files: ModelFiles, config: PreTrainedConfig, reason: str) -> Opened:
    """Open a model with everything in memory, because of the reason."""
    dtype = _dtype(settings, config, None)
    if files.kind == "gguf" and settings.dtype == "auto":
        dtype = torch.float32  # what dequantizing gives
    model = from_pretrained(settings, files, config, dtype)
    unfuse_experts(model)
    prefixes = tuple(f"{name}." for name in find_blocks(model))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefixes)}
    return Opened(model, _InMemory(tensors), frozenset(model.all_tied_weights_keys), reason)


def _build_skeleton(settings: ModelSettings, config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    """Build a model with all parameters on ``meta``; buffers are computed, as most are in no checkpoint."""
    build: Any = AutoModelForCausalLM.from_config
    try:
        with init_empty_weights(include_buffers=False):
            model = build(
                config,
                dtype=dtype,
                attn_implementation=_attention(settings, config),
                trust_remote_code=settings.trust_remote_code,
            )
    except LOADING_ERRORS as error:
        raise AptqError(f"{settings.path}: transformers cannot build this model: {error}") from error
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def open_streamed(settings: ModelSettings, files: ModelFiles, config: PreTrainedConfig) -> Opened | str:
    """Open a model with its blocks on ``meta``, or say why that cannot be."""
    checkpoint = Checkpoint(files.weights)
    model = _build_skeleton(settings, config, _dtype(settings, config, checkpoint.dtype))
    find_blocks(model)  # before the names in the file: a model without blocks has no use for them
    try:
        recipes = plan_recipes(model, checkpoint)
        unfuse_experts(model)
        recipes = unfuse_recipes(model, recipes)
        dtypes = parameter_dtypes(model, model.dtype)
        store = _OnDisk(checkpoint, recipes, dtypes)
        return Opened(model, store, _fill(settings, model, store), None)
    except NotStreamable as reason:
        return str(reason)


def _fill(settings: ModelSettings, model: PreTrainedModel, store: _OnDisk) -> frozenset[str]:
    """Read what lies outside the blocks, tie what is to be tied, and return the names that share another tensor."""
    prefixes = tuple(f"{name}." for name in find_blocks(model))
    ties: dict[str, str] = model.all_tied_weights_keys
    if any(name.startswith(prefixes) for tie in ties.items() for name in tie):
        raise NotStreamable("its blocks share weights")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check_complete(
        settings,
        (name for name in parameters if name not in store and name not in ties and name not in ties.values()),
    )
    for name in parameters:
        if name.startswith(prefixes):
            assign(model, name, store.placeholder(name))  # in the dtype that it will be loaded in
    outside = [name for name in model.state_dict() if not name.startswith(prefixes) and name in store]
    for name, tensor in store.read(outside):
        assign(model, name, tensor.clone())
    return _tie(settings, model, store, ties)


def _tie(settings: ModelSettings, model: PreTrainedModel, store: _OnDisk, ties: dict[str, str]) -> frozenset[str]:
    """Share the tensors that the config ties; as transformers does, not when both are stored and differ."""
    tied = set()
    for target, origin in list(ties.items()):
        have, need = (origin, target) if origin in store else (target, origin)
        _check_complete(settings, [] if have in store else [origin])
        stored = model.get_parameter(have)
        if need in store and not torch.equal(stored, model.get_parameter(need)):
            _log.warning("%s and %s are tied by the config but stored with other values; they are not tied", need, have)
            ties.pop(target)
            continue
        parent, _, leaf = need.rpartition(".")
        model.get_submodule(parent)._parameters[leaf] = stored
        tied.add(target)
    return frozenset(tied)
