from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaModel, LlamaPreTrainedModel
from transformers.pytorch_utils import Conv1D

import aptq.hf
import aptq.hf_config
from aptq.activations.block_scaled import BlockScaled
from aptq.api import AptqError, Curvature, ExportJob, Option
from aptq.exporters.native import Native
from aptq.formats.integer import Integer
from aptq.layer import PackedLinear
from aptq.models.experts import unfuse_experts
from aptq.quantizers.nearest import Nearest
from aptq.transforms.hadamard import Hadamard

ROOT = Path(__file__).parents[1]
OPTIONS = (Option(4, 64), Option(3, 32), Option(2, -1))
TOKENS = torch.arange(20).reshape(2, 10) * 7 % 250 + 4


@dataclass(frozen=True)
class Exported:
    folder: Path
    plan: dict[str, Option]
    logits: torch.Tensor  # of the model with dequantized weights


def export(source: Path, folder: Path, *, head: bool = False, dtype: str = "float32", unpacked: str = "") -> Exported:
    """Round every layer with a mix of options, export it, and keep what the dense rounded model answers."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    unfuse_experts(model)
    format, nearest = Integer(), Nearest()
    plan: dict[str, Option] = {}
    shapes: dict[str, tuple[int, int]] = {}
    packed = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or (name == "lm_head" and not head) or name == unpacked:
            continue
        weight = (module.weight if isinstance(module, nn.Linear) else module.weight.T).detach().float()
        option = plan[name] = OPTIONS[len(plan) % len(OPTIONS)]
        factors = nearest.prepare(Curvature(column=torch.eye(weight.shape[1])[None], tokens=1))
        quantized = nearest.quantize(weight, factors, format, option).weight
        packed[name] = format.pack(quantized, option)
        shapes[name] = (weight.shape[0], weight.shape[1])
        dense = format.dequantize(quantized, option).to(model.dtype)
        module.weight = nn.Parameter(dense if isinstance(module, nn.Linear) else dense.T)
    tied = model.config.tie_word_embeddings
    others = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.rpartition(".weight")[0] not in plan and not (tied and name == "lm_head.weight")
    }
    job = ExportJob(
        plan=plan,
        shapes=shapes,
        format=format,
        format_config={"name": "integer", "group_size": 64, "symmetric": False},
        packed=packed.__getitem__,
        full_precision=lambda: iter(others.items()),
        config=model.config,
        generation_config=model.generation_config,
        tokenizer=AutoTokenizer.from_pretrained(source),
        provenance={"made by": "a test"},
    )
    Native(max_shard_size="60KB").export(job, folder)
    with torch.no_grad():
        return Exported(folder, plan, model(TOKENS).logits)


@pytest.fixture(scope="module")
def exported(
    tiny_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Exported]:
    made: dict[str, Exported] = {}

    def make(family: str = "llama", **options: Any) -> Exported:
        key = f"{family} {options}"
        if key not in made:
            source = tiny_model_folder(family, num_hidden_layers=2)
            made[key] = export(source, tmp_path_factory.mktemp("exported") / "model", **options)
        return made[key]

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS).logits
    return result


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# --------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    "family", ["llama", "llama_untied", "qwen2", "gemma2", "opt", "gpt2", "mixtral", "qwen3_moe", "qwen2_moe"]
)
def test_the_loaded_model_answers_as_the_dense_rounded_one(family: str, exported: Callable[..., Exported]) -> None:
    source = exported(family)
    model, info = AutoModelForCausalLM.from_pretrained(source.folder, output_loading_info=True)
    assert not any(info.values()), info
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert {name: layer.option for name, layer in layers.items()} == {
        name: replace(option, format="integer") for name, option in source.plan.items()
    }
    torch.testing.assert_close(logits(model), source.logits, rtol=1e-5, atol=1e-5)


def test_weights_are_bit_equal_and_the_embeddings_stay_tied(exported: Callable[..., Exported]) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported().folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(exported().folder)))
    stored = tensors_of(exported().folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored.get(name, model.lm_head.weight), tensor)


_FRESH = """
import site, sys
site.addsitedir(sys.argv[1])  # as Python does at start with a folder of installed packages
assert not {"torch", "transformers"} & sys.modules.keys()
import torch
from transformers import AutoModelForCausalLM
tokens, *sources = torch.load(sys.argv[2])
for folder, logits, layers in sources:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-5, atol=1e-5)
    generated = model.generate(tokens[:1], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert generated.shape == (1, tokens.shape[1] + 5), generated.shape
    assert sum(type(module).__name__ == "PackedLinear" for module in model.modules()) == layers
"""


def test_a_fresh_process_loads_and_generates_without_importing_aptq(
    exported: Callable[..., Exported], tmp_path: Path
) -> None:
    sources = [exported(family) for family in ("llama", "gpt2", "mixtral")]
    rows = [(str(source.folder), source.logits, len(source.plan)) for source in sources]
    torch.save([TOKENS, *rows], tmp_path / "expected.pt")
    shutil.copy(ROOT / "packaging" / "aptq_autoload.pth", tmp_path)
    command = [sys.executable, "-S", "-c", _FRESH, tmp_path, tmp_path / "expected.pt"]
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])  # -S: no .pth file but ours is read
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_leaves_packed_tensors_as_stored(dtype: str, exported: Callable[..., Exported]) -> None:
    source = exported("qwen2")
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype)
    stored = tensors_of(source.folder)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            for tensor, value in module.packed().items():
                assert value.dtype == stored[f"{name}.{tensor}"].dtype
                assert torch.equal(value, stored[f"{name}.{tensor}"])
            assert module.bias is None or module.bias.dtype == getattr(torch, dtype)
    assert model.model.embed_tokens.weight.dtype == getattr(torch, dtype)
    assert logits(model).dtype == getattr(torch, dtype)
    torch.testing.assert_close(logits(model).float(), source.logits, rtol=0.1, atol=0.3)


def test_modules_kept_in_float32_do_not_cast_packed_tensors(
    exported: Callable[..., Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", {"q_proj", "norm"})
    model = AutoModelForCausalLM.from_pretrained(exported().folder, dtype="bfloat16")
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].self_attn.q_proj.scales.dtype == torch.float16


def test_a_bfloat16_model_answers_as_the_dense_rounded_one(exported: Callable[..., Exported]) -> None:
    """``reference`` rounds the weight to bfloat16 as the dense model does; kernels multiply by it unrounded."""
    source = exported(dtype="bfloat16")
    for backend, tolerance in (("reference", {}), ("auto", {"rtol": 0.05, "atol": 0.05})):
        model = aptq.hf.load(source.folder, backend=backend)
        assert model.dtype == torch.bfloat16
        torch.testing.assert_close(logits(model), source.logits, **tolerance)


def test_a_device_map_does_not_get_in_the_way(exported: Callable[..., Exported]) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported().folder, device_map="auto")
    torch.testing.assert_close(logits(model).cpu(), exported().logits, rtol=1e-5, atol=1e-5)


def test_blocks_may_be_offloaded_to_the_disk(exported: Callable[..., Exported], tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(exported().folder, device_map=device_map, offload_folder=tmp_path)
    torch.testing.assert_close(logits(model), exported().logits, rtol=1e-5, atol=1e-5)


def test_a_packed_head_is_untied_from_the_embeddings(exported: Callable[..., Exported], tmp_path: Path) -> None:
    source = exported(head=True)
    model, info = AutoModelForCausalLM.from_pretrained(source.folder, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(model.lm_head, PackedLinear)
    torch.testing.assert_close(logits(model), source.logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(aptq.hf.load(tmp_path)), source.logits, rtol=1e-5, atol=1e-5)


def test_an_expert_may_stay_in_full_precision(exported: Callable[..., Exported], tmp_path: Path) -> None:
    source = exported("mixtral", unpacked="model.layers.1.mlp.experts.2.down_proj")
    model, info = AutoModelForCausalLM.from_pretrained(source.folder, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(model), source.logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert tensors_of(tmp_path).keys() == tensors_of(source.folder).keys()


def test_the_base_model_loads_alone(exported: Callable[..., Exported]) -> None:
    base = LlamaModel.from_pretrained(exported().folder)
    whole = AutoModelForCausalLM.from_pretrained(exported().folder)
    with torch.no_grad():
        assert torch.equal(base(TOKENS).last_hidden_state, whole.model(TOKENS).last_hidden_state)


# ---------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen2_moe"])
def test_saving_a_loaded_model_writes_the_checkpoint_again(
    family: str, exported: Callable[..., Exported], tmp_path: Path
) -> None:
    source = exported(family)
    aptq.hf.load(source.folder, backend="reference").save_pretrained(tmp_path)
    before, after = tensors_of(source.folder), tensors_of(tmp_path)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source.folder, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert "backend" not in configs[1]["quantization_config"]
    torch.testing.assert_close(logits(aptq.hf.load(tmp_path)), source.logits, rtol=1e-5, atol=1e-5)


def test_a_loaded_model_leaves_the_file(exported: Callable[..., Exported]) -> None:
    """Its tensors lie in memory of their own, so that pages of the file do not count twice."""
    model = aptq.hf.load(exported().folder)
    places = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert len(places) == 1
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(exported().folder) not in maps.read_text()


def test_a_loaded_model_can_be_copied_and_cast(exported: Callable[..., Exported], tmp_path: Path) -> None:
    model = copy.deepcopy(aptq.hf.load(exported().folder)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    after = tensors_of(tmp_path)
    for name, tensor in tensors_of(exported().folder).items():
        if name.rpartition(".")[0] in exported().plan:
            assert torch.equal(after[name], tensor)


def test_what_quantizes_inputs_is_part_of_the_checkpoint(exported: Callable[..., Exported], tmp_path: Path) -> None:
    entry = {"name": "block_scaled", "bits": 3, "code": "int", "group_size": 16, "scale_dtype": "float32"}
    model = aptq.hf.load(changed(exported().folder, tmp_path / "changed", activation=entry))
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert all(layer.activation == BlockScaled(bits=3, group_size=16, scale_dtype="float32") for layer in layers)
    assert not torch.allclose(logits(model), exported().logits, atol=1e-2)
    model.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert again["activation"] == entry
    torch.testing.assert_close(logits(aptq.hf.load(tmp_path / "again")), logits(model))


def test_the_basis_of_storage_is_part_of_the_checkpoint(exported: Callable[..., Exported], tmp_path: Path) -> None:
    entry = {"name": "hadamard", "seed": 3}
    model = aptq.hf.load(changed(exported().folder, tmp_path / "changed", transform=entry))
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert all(layer.transform == Hadamard(seed=3) for layer in layers)
    assert not torch.allclose(logits(model), exported().logits, atol=1e-2)
    model.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert again["transform"] == entry
    assert "activation" not in again
    torch.testing.assert_close(logits(aptq.hf.load(tmp_path / "again")), logits(model))


# ---------------------------------------------------------------------------------------------------- errors


def changed(source: Path, folder: Path, **changes: Any) -> Path:
    """Copy a checkpoint with some entries of its quantization_config replaced."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": {"name": "lattice"}}, r"Unknown format 'lattice'.*integer"),
        ({"format": {"name": "integer", "colour": 3}}, "colour"),
        ({"format": "integer"}, "mapping with a name"),
        ({"activation": "int8"}, "activation must be a mapping with a name"),
        ({"transform": "hadamard"}, "transform must be a mapping with a name"),
        ({"transform": {"name": "hadamard", "sed": 1}}, "sed"),
        ({"activation": {"name": "int9"}}, r"Unknown activation 'int9'.*block_scaled"),
        ({"version": 2}, "version 2; this aptq reads versions 1 to 1. Upgrade"),
        ({"novelty": 1}, "novelty"),
        ({"layers": {"model.layers.0.mlp.up_proj": {"bits": 4}}}, "must be {'bits': int, 'group_size': int}"),
        ({"layers": {"model.layers.9.mlp.up_proj": {"bits": 4, "group_size": 64}}}, "LlamaForCausalLM does not have"),
        ({"layers": {"model.norm": {"bits": 4, "group_size": 64}}}, "model.norm, but it is a LlamaRMSNorm"),
        ({"layers": {"model.layers.0.mlp.up_proj": {"bits": 9, "group_size": 64}}}, "bits=9"),
    ],
)
def test_a_config_that_cannot_be_served_is_answered_clearly(
    changes: dict[str, Any], message: str, exported: Callable[..., Exported], tmp_path: Path
) -> None:
    folder = changed(exported().folder, tmp_path / "changed", **changes)
    with pytest.raises(AptqError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_with_lost_tensors_is_refused(exported: Callable[..., Exported], tmp_path: Path) -> None:
    folder = shutil.copytree(exported().folder, tmp_path / "lost")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lost = "model.layers.1.self_attn.k_proj.scales"
    file = folder / index["weight_map"].pop(lost)
    save_file({name: tensor for name, tensor in load_file(file).items() if name != lost}, file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AptqError, match=f"lacks 1 packed tensors, {lost}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_load_refuses_what_is_no_checkpoint_of_ours(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(AptqError, match=r"no checkpoint of aptq.*from_pretrained"):
        aptq.hf.load(tiny_model_folder())
    with pytest.raises(AptqError, match="No model could be read"):
        aptq.hf.load(tmp_path)


def test_load_answers_an_unknown_backend_with_what_is_installed(exported: Callable[..., Exported]) -> None:
    with pytest.raises(AptqError, match=r"(?s)warp.*reference"):
        aptq.hf.load(exported().folder, backend="warp")


def test_a_dense_model_cannot_be_quantized_on_the_fly(tiny_model_folder: Callable[..., Path]) -> None:
    config = aptq.hf_config.AptqConfig({"name": "integer"}, {})
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tiny_model_folder(), quantization_config=config)
