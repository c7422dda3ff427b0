"""Turns a checkpoint of aptq into plain weights for the common judge, through its public loader."""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import aptq  # noqa: F401 - makes transformers read the checkpoint
from aptq.layer import PackedLinear


def main() -> None:
    """Load ``--model`` and save the dense float32 weight of every packed layer to ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    dense = {
        f"{name}.weight": module.dense().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
    }
    save_file(dense, arguments.output)


if __name__ == "__main__":
    main()
