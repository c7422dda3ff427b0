"""What exporters of model folders share."""

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from aptq.api import AptqError
from aptq.exporters.folder import FolderExporter, check_linear, model_dtype


def test_linear_layers_only() -> None:
    check_linear("some", {"model.layers.0.mlp.up_proj": (8, 8)}, LlamaConfig())
    with pytest.raises(AptqError, match="exporter=some writes Linear layers only, not Conv1D"):
        check_linear("some", {"transformer.h.0.mlp.c_fc": (8, 8)}, GPT2Config())
    with pytest.raises(AptqError, match=r"not a\.experts\.0\.up_proj"):
        check_linear("some", {"a.experts.0.up_proj": (8, 8)}, LlamaConfig())


def test_a_config_without_a_dtype_is_of_float32() -> None:
    assert model_dtype(LlamaConfig()) == torch.float32
    assert model_dtype(LlamaConfig(dtype="bfloat16")) == torch.bfloat16


def test_a_shard_size_that_is_none_is_refused() -> None:
    with pytest.raises(AptqError, match="max_shard_size='big' is no size"):
        FolderExporter(max_shard_size="big")
