"""Writes a random LLaMA-shaped model: time and memory of quantization do not depend on what the weights are."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aptq.models import open_model
from aptq.settings import ModelSettings


def main() -> None:
    """Save a seeded float32 model of ``--width`` and ``--blocks`` with SmolLM2's proportions and tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, required=True, help="hidden size, a multiple of 64")
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = open_model(ModelSettings(path="smollm2")).tokenizer
    heads = max(1, arguments.width // 64)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 8 // 3,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
