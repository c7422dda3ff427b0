"""The native checkpoint in transformers: ``AutoModelForCausalLM.from_pretrained`` and ``save_pretrained``.

``aptq._autoload`` imports this module while ``transformers`` is still being imported, so nothing of its models may be
imported at the top; the last line registers the two classes with it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.base import HfQuantizer

from aptq import registry
from aptq.api import ActivationQuantizer, AptqError, Format, Option, StoredEmbedding, Transform, format_of
from aptq.backends.select import installed_backends
from aptq.embedding import PackedEmbedding
from aptq.hf_config import METHOD, AptqConfig
from aptq.large_pages import LargePages
from aptq.layer import PackedLinear
from aptq.packed import PackedModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)


class AptqHfQuantizer(HfQuantizer):
    """Put packed layers into the empty model before its weights are read, and choose backends after."""

    requires_calibration = True  # transformers then refuses to quantize a dense model on the fly
    quantization_config: AptqConfig

    def __init__(self, quantization_config: AptqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._packed: set[str] = set()  # full names of the packed tensors

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the checkpoint again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradients."""
        return False

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Never cast a packed tensor: a scale in another dtype would be another weight."""
        if converter.target_patterns[0] in self._packed:
            return None
        new: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return new

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype | None = None,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        config = self.quantization_config
        format = registry.build("format", config.format)
        activation = None if config.activation is None else registry.build("activation", config.activation)
        transform = None if config.transform is None else registry.build("transform", config.transform)
        options = _resolve(model, config.options())
        for name, option in options.items():
            _swap(model, name, option, format_of(format, option), dtype, activation, transform)
            self._packed.update(f"{name}.{tensor}" for tensor in _packed_module(model, name).packed_names)
        untied = set(options)
        if (embedding := config.stored_embedding()) is not None:
            name, head = _swap_embedding(model, embedding, dtype)
            self._packed.update(f"{name}.{tensor}" for tensor in _packed_module(model, name).packed_names)
            untied |= {name, head or name}
        _untie(model, untied)
        _check_files(checkpoint_files or (), self._packed, model.base_model_prefix)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        backends, refusals = installed_backends()
        for name, reason in refusals.items():
            _log.warning("backend %s cannot be used: %s", name, reason)
        _settle(model)
        for module in model.modules():
            # On meta there is nothing to multiply with yet.
            if isinstance(module, PackedLinear) and not any(each.is_meta for each in module.packed().values()):
                module.select_backend(self.quantization_config.backend, backends)
        return model


def load(
    path: str | Path,
    backend: str | Mapping[str, Any] = "auto",
    device_map: Any = None,
    dtype: str | torch.dtype = "auto",
) -> PreTrainedModel:
    """Load a native checkpoint, its layers packed.

    Args:
        path: folder or hub id.
        backend: what multiplies the packed layers; "auto" takes the best that accepts each. With options:
            ``{"name": "cpu", "activations": "int8"}``.
        device_map: as in ``from_pretrained``.
        dtype: of activations and full-precision weights; "auto" is as stored.

    Raises:
        AptqError: when there is no such checkpoint, a plug-in that it needs is missing, or the backend refuses.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # heavy, and circular at the top (see the module)

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise AptqError(f"No model could be read at {path}: {error}") from error
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, Mapping) else None
    if not isinstance(stored, Mapping) or method != METHOD:
        raise AptqError(
            f"{path} is no checkpoint of aptq (quant_method is {method!r}). aptq.load opens what the native exporter "
            "wrote; use transformers' from_pretrained for other models."
        )
    config.quantization_config = {**stored, "backend": backend}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, config=config, device_map=device_map, dtype=dtype
    )
    return model


def _settle(model: nn.Module) -> None:
    """Move what is on the CPU from the mapped file to memory that is faster to read.

    All of it: while a tensor is left in the file, its pages are resident, too.
    """
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers()) if each.device.type == "cpu"}
    memory = LargePages(tensor.nbytes for tensor in tensors.values())
    copies = {key: memory.copy(tensor.data) for key, tensor in tensors.items()}
    for module in model.modules():
        for parameter in module._parameters.values():
            if id(parameter) in copies:
                parameter.data = copies[id(parameter)]  # type: ignore[union-attr]  # None is not among them
        for name, buffer in module._buffers.items():
            if id(buffer) in copies:  # another tensor: it is a view, and holds what it is a view of
                module._buffers[name] = copies[id(buffer)]


def _resolve(model: PreTrainedModel, options: Mapping[str, Option]) -> dict[str, Option]:
    """Map the layers of a checkpoint to those of the model, which may be only the base of the model that was saved."""
    prefix = f"{model.base_model_prefix}."
    present = dict(model.named_modules())
    if not any(name in present for name in options):
        options = {name.removeprefix(prefix): option for name, option in options.items()}
    if any(name not in present for name in options):
        from aptq.models.experts import unfuse_experts  # imports transformers' models: circular at the top

        unfuse_experts(model)
        present = dict(model.named_modules())
    lost = [name for name in options if name not in present]
    if lost:
        raise AptqError(
            f"quantization_config lists {len(lost)} layers that {type(model).__name__} does not have: "
            f"{', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}. Load it with the class that it was saved from, "
            "and the transformers release that its provenance names."
        )
    return dict(options)


def _swap(
    model: nn.Module,
    name: str,
    option: Option,
    format: Format,
    dtype: torch.dtype | None,
    activation: ActivationQuantizer | None,
    transform: Transform | None,
) -> None:
    """Replace one layer by a packed one without memory."""
    from transformers.pytorch_utils import Conv1D  # circular at the top

    module = model.get_submodule(name)
    if isinstance(module, nn.Linear):
        out_features, in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
    else:
        raise AptqError(
            f"quantization_config lists {name}, but it is a {type(module).__name__}; Linear and Conv1D can be packed."
        )
    with torch.device("meta"):
        packed = PackedLinear(
            in_features,
            out_features,
            bias=module.bias is not None,
            format=format,
            format_name=option.format,
            option=option,
            dtype=dtype,
            activation=activation,
            transform=transform,
        )
    model.set_submodule(name, packed)
    parent = model.get_submodule(name.rpartition(".")[0])
    if not any(True for _ in parent.buffers(recurse=False)):
        # Some models (GPT-2) initialize the weights of a module's children, which are packed now and have no `weight`.
        parent._is_hf_initialized = True  # type: ignore[assignment]


def _packed_module(model: nn.Module, name: str) -> PackedModule:
    module = model.get_submodule(name)
    assert isinstance(module, PackedModule)
    return module


def _swap_embedding(
    model: PreTrainedModel, stored: StoredEmbedding, dtype: torch.dtype | None
) -> tuple[str, str | None]:
    """Replace the input embedding, and a head that is tied to it, without memory; return their names here."""
    present = dict(model.named_modules())
    name = stored.name if stored.name in present else stored.name.removeprefix(f"{model.base_model_prefix}.")
    module = present.get(name)
    if not isinstance(module, nn.Embedding):
        raise AptqError(
            f"quantization_config says that {stored.name} is a packed embedding, and {type(model).__name__} has "
            f"{'none' if module is None else f'a {type(module).__name__}'} there. Load it with the class that it was "
            "saved from, and the transformers release that its provenance names."
        )
    how: dict[str, Any] = {
        "format": registry.build("format", stored.format_config),
        "format_name": stored.option.format,
        "option": stored.option,
        "dtype": dtype,
    }
    rows, columns = module.weight.shape
    with torch.device("meta"):
        packed = PackedEmbedding(rows, columns, scale=stored.scale, **how)
    model.set_submodule(name, packed)
    head = None if stored.head is None else present.get(stored.head)
    if not isinstance(head, nn.Linear):  # not there in the base of a model
        return name, None
    with torch.device("meta"):
        tied = PackedLinear(columns, rows, bias=head.bias is not None, holder=packed, **how)
    model.set_submodule(stored.head or "", tied)
    return name, stored.head


def _untie(model: PreTrainedModel, names: Collection[str]) -> None:
    """Let packed output heads and embeddings go their own ways: they have no weight left that could be shared."""
    ties = model.all_tied_weights_keys.items()
    tied = [key for key, origin in ties if {key.rpartition(".")[0], origin.rpartition(".")[0]} & set(names)]
    for key in tied:
        del model.all_tied_weights_keys[key]
    if tied and not model.all_tied_weights_keys:
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False


def _check_files(files: Sequence[str], expected: set[str], prefix: str) -> None:
    """Raise when the files lack packed tensors: transformers would fill them with noise and only warn."""
    stored: set[str] = set()
    for file in (file for file in files if file.endswith(".safetensors")):
        with safe_open(file, framework="pt") as handle:
            stored.update(handle.keys())
    lost = sorted(expected - stored - {name.removeprefix(f"{prefix}.") for name in stored}) if stored else []
    if lost:
        raise AptqError(
            f"The checkpoint lacks {len(lost)} packed tensors, {lost[0]} for one: it is incomplete, or was changed "
            "after it was written. Export it again."
        )


def _register() -> None:
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(AptqConfig)
        auto.register_quantizer(METHOD)(AptqHfQuantizer)


_register()
