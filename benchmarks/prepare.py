"""Writes what all contestants share: one float32 model folder and one file of calibration token ids.

A script of its own so that the process that measures stays small.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from aptq.data import calibration_samples
from aptq.models import open_model
from aptq.settings import DataSettings, ModelSettings


def materialise(path: str, folder: Path, data: DataSettings, tokens: Path) -> dict[str, object]:
    """Save a model as dense float32 safetensors with its tokenizer, and the calibration samples beside it.

    Args:
        path: a folder, a hub id, or "smollm2" (a GGUF, which is dequantized here once, so that nobody measures that).
        folder: where the model goes.
        data: which samples to cut.
        tokens: safetensors file that gets ``input_ids [samples, length]``.

    Returns:
        shape of the model, for the record.
    """
    source = open_model(ModelSettings(path=path, dtype="float32"))
    loaded = source.load_full()
    config = loaded.config
    if hasattr(config, "quantization_config"):  # what a GGUF leaves behind; its weights are dense by now
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    save_file({"input_ids": calibration_samples(data, source.tokenizer)}, tokens)
    shapes = source.layer_shapes()
    return {
        "model_type": config.model_type,
        "blocks": len(source.block_names),
        "layers": len(shapes),
        "quantized_weights": sum(rows * columns for rows, columns in shapes.values()),
    }


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True, help="text file to cut samples from")
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where the model is written")
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--record", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    data = DataSettings(
        source="text",
        path=arguments.calibration,
        num_samples=arguments.samples,
        sequence_length=arguments.length,
        seed=arguments.seed,
    )
    record = materialise(arguments.model, arguments.folder, data, arguments.tokens)
    arguments.record.write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
