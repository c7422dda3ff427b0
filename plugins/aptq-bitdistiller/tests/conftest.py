"""A tiny model, and runs of it at 2 and 3 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import aptq


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a seeded Llama of two blocks, head tied, and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={each: at for at, each in enumerate(["</s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return ``make(*overrides)``: the folder of a finished run at 2 and 3 bits; the same overrides, the same run."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*overrides: str) -> Path:
        if overrides not in made:
            folder = tmp_path_factory.mktemp("runs") / "run"
            aptq.quantize(
                [
                    f"model.path={model_folder}",
                    "data.num_samples=4",
                    "data.sequence_length=64",
                    *(() if "evaluator=none" in overrides else ("evaluator.num_sequences=4",)),
                    "allocator=blockwise",
                    "allocator.high=3",
                    "allocator.low=2",
                    "allocator.ratio=0.5",
                    "format.group_size=16",
                    "fabric=cpu",
                    "callback=none",
                    "logger=none",
                    "samples=0",
                    f"run.dir={folder}",
                    f"cache_dir={folder.parent / 'cache'}",
                    *overrides,
                ]
            )
            made[overrides] = folder
        return made[overrides]

    return make
