"""Fixtures of all tests: tiny models on disk, and why a marked test is skipped."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

gc.disable()  # until all tests are collected: see pytest_collection_finish

_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]

_COMMON: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}

_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_COMMON, "tie_word_embeddings": True}),
    "llama_untied": ("llama", {**_COMMON, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {**_COMMON, "intermediate_size": 80}),
    "qwen3": ("qwen3", {**_COMMON, "head_dim": 32}),
    "mistral": ("mistral", {**_COMMON, "sliding_window": 32}),
    "gemma2": ("gemma2", {**_COMMON, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}),
    "gemma3": ("gemma3_text", {**_COMMON, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}),
    "phi": ("phi", {**_COMMON, "num_key_value_heads": 4}),
    "opt": (
        "opt",
        {
            **{key: value for key, value in _COMMON.items() if key not in ("intermediate_size", "num_key_value_heads")},
            "ffn_dim": 96,
            "word_embed_proj_dim": 64,
        },
    ),
    "gpt2": (
        "gpt2",
        {
            **{key: value for key, value in _COMMON.items() if key.endswith("token_id") or key == "vocab_size"},
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 256,
            "n_inner": 96,
        },
    ),
    "mixtral": (
        "mixtral",
        {**_COMMON, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen3_moe": ("qwen3_moe", {**_COMMON, **_EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "qwen2_moe": ("qwen2_moe", {**_COMMON, **_EXPERTS, "shared_expert_intermediate_size": 80}),
}


def _build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes: 4 special tokens and one token for each byte, 260 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(_SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _build_model(config: PreTrainedConfig) -> Any:
    """Return a model with seeded weights, no bias of which is zero and no norm of which is one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.normal_(std=0.7 * parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return ``make(family="llama", **config_overrides) -> Path``: a folder with a tiny seeded model and a tokenizer.

    Families: llama (tied), llama_untied, qwen2, qwen3, mistral, gemma2, gemma3, phi, opt, gpt2, mixtral, qwen3_moe,
    qwen2_moe.
    Hidden 64, 3 blocks, 260 tokens, 256 positions, float32; ``dtype="bfloat16"`` is an override like any other.
    Folders are shared by the whole session: copy one before changing a file in it.
    """
    made: dict[str, Path] = {}

    def make(family: str = "llama", **config_overrides: Any) -> Path:
        key = f"{family} {sorted(config_overrides.items())!r}"
        if key not in made:
            model_type, options = _FAMILIES[family]
            config = AutoConfig.for_model(model_type, **{"dtype": "float32", **options, **config_overrides})
            folder = tmp_path_factory.mktemp(family)
            _build_model(config).save_pretrained(folder)
            _build_tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that runs slow tests."""
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption("--seed", type=int, default=0, help="what torch is seeded with before every test (default: 0)")


class _Seeded:
    """Every test draws the same numbers, whatever ran before it; another ``--seed`` finds those that pass by luck."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def pytest_runtest_setup(self) -> None:
        torch.manual_seed(self._seed)


def pytest_configure(config: pytest.Config) -> None:
    """Seed all tests, those of the plugins as well: a hook of this file alone is not called for other folders."""
    config.pluginmanager.register(_Seeded(config.getoption("--seed")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine or this call leaves out, with the reason."""
    skips: dict[str, str] = {}
    if not config.getoption("--run-slow"):
        skips["slow"] = "slow: run with --run-slow"
    if not torch.cuda.is_available():
        skips["gpu"] = "gpu: no CUDA device here"
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        skips["distributed"] = "distributed: this torch was built without gloo"
    for item in items:
        for marker, reason in skips.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Turn the garbage collector on, for what tests make: it goes through a million imported objects no more."""
    gc.freeze()
    gc.enable()
