"""Models that are done: read again to be judged or exported anew."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor

from aptq import registry
from aptq.api import AptqError, ExportJob
from aptq.layer import PackedLinear
from aptq.run import Run
from aptq.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def open_for_use(
    settings: ModelSettings, backend: str | Mapping[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, on the CPU: packed when aptq wrote it, as it is otherwise.

    Raises:
        AptqError: there is no such model, or it is one whose loader is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # heavy

    from aptq.hf import load
    from aptq.models import open_model

    config = Path(settings.path) / "config.json"
    quantization = json.loads(config.read_text()).get("quantization_config") if config.is_file() else None
    if quantization:
        tokenizer = AutoTokenizer.from_pretrained(settings.path)
        if quantization.get("quant_method") == "aptq":
            return load(settings.path, backend=backend, dtype=settings.dtype), tokenizer
        try:
            return AutoModelForCausalLM.from_pretrained(settings.path, dtype=settings.dtype), tokenizer
        except ImportError as error:
            method = quantization.get("quant_method")
            raise AptqError(f"{settings.path} is quantized by {method}, and its loader is missing: {error}") from error
    source = open_model(settings)
    return source.load_full(), source.tokenizer


def job_of(run: Run) -> ExportJob:
    """Return what an exporter needs, read from the native checkpoint of a finished run.

    Raises:
        AptqError: when the run has no native checkpoint.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig  # heavy

    from aptq.hf import load
    from aptq.hf_config import AptqConfig

    folder = run.model_folder
    files = sorted(folder.glob("*.safetensors"))
    plan = run.plan()
    if plan is None or not files:
        raise AptqError(f"The run in {run.folder} has no finished model to export; run it to its end first.")
    stored = json.loads((folder / "config.json").read_text())
    quantization = stored.get("quantization_config", {})
    if quantization.get("quant_method") != "aptq":
        raise AptqError(f"{folder} was not written by the native exporter, which is the one that can be read again.")
    where = {name: file for file in files for name in _names(file)}
    embedding = AptqConfig(**quantization).stored_embedding()
    packed_names: dict[str, list[str]] = {layer: [] for layer in plan.layers}
    if embedding is not None:
        packed_names[embedding.name] = []
    other_names: list[str] = []
    for name in where:
        layer, _, short = name.rpartition(".")
        (packed_names[layer] if layer in packed_names and short != "bias" else other_names).append(name)

    def packed(layer: str) -> dict[str, Tensor]:
        return {name.rpartition(".")[2]: _read(where[name], name) for name in packed_names[layer]}

    def full_precision() -> Iterator[tuple[str, Tensor]]:
        yield from ((name, _read(where[name], name)) for name in other_names)

    format_config: dict[str, Any] = quantization["format"]
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    skeleton = load(folder, device_map={"": "meta"})
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in skeleton.named_modules()
        if isinstance(module, PackedLinear) and name in plan.layers  # a tied head is not
    }
    return ExportJob(
        plan=plan.layers,
        shapes=shapes,
        format=registry.build("format", format_config),
        format_config=format_config,
        packed=packed,
        full_precision=full_precision,
        config=config,
        generation_config=GenerationConfig.from_pretrained(folder)
        if (folder / "generation_config.json").exists()
        else None,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        provenance=quantization.get("provenance", {}),
        activation_config=quantization.get("activation"),
        transform_config=quantization.get("transform"),
        embedding=embedding,
    )


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor
