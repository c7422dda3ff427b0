"""Pass 1 behind blocks that are rounded once they are measured."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from aptq.api import Callback, Curvature, HessianEstimator, LayerStatistics, Option
from aptq.calibration.measure import Rounding, measure
from aptq.calibration.statistics import StatisticsCache
from aptq.calibration.walk import Walk
from aptq.formats.integer import Integer
from aptq.hessians.attention import Attention
from aptq.hessians.input import Input
from aptq.models import open_model
from aptq.quantizers.gptq import GPTQ
from aptq.settings import ModelSettings

SAMPLES = torch.randint(4, 260, (4, 64), generator=torch.Generator().manual_seed(0))
OPTIONS = (Option(2, 32), Option(4, 32))
Folder = Callable[..., Path]


def _measure(
    folder: Path,
    cache: Path,
    bits: int | None,
    *,
    estimator: HessianEstimator | None = None,
    errors: bool = False,
    batch_size: int = 2,
    **model: Any,
) -> dict[str, LayerStatistics]:
    source = open_model(ModelSettings(path=str(folder), **model))
    return measure(
        Walk(source, SAMPLES, batch_size, Fabric(accelerator="cpu", devices=1)),
        estimator or Input(),
        layers=list(source.layer_shapes()),
        rounding=Rounding(
            quantizer=GPTQ(),
            format=Integer(),
            errors=OPTIONS if errors else (),
            prefix=None if bits is None else Option(bits, 32),
        ),
        cache=StatisticsCache(cache, "key"),
        callbacks=Callback(),
    )


def _keep(inputs: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Tensor]) -> None:
    inputs[name] = args[0].flatten(0, 1)


def _reference(folder: Path, bits: int) -> dict[str, float]:
    """Return the traces that one finds by running the whole model again for each block, rounding it afterwards."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    traces = {}
    for index in range(model.config.num_hidden_layers):
        inputs: dict[str, Tensor] = {}
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and f"layers.{index}." in name
        }
        handles = [module.register_forward_pre_hook(partial(_keep, inputs, name)) for name, module in layers.items()]
        with torch.no_grad():
            model(input_ids=SAMPLES)
        for handle in handles:
            handle.remove()
        for name, module in layers.items():
            x = inputs[name]
            hessian = 2 * x.T @ x / SAMPLES.numel()
            traces[name] = module.out_features * hessian.trace().item()
            factors = GPTQ().prepare(Curvature(column=hessian[None], tokens=SAMPLES.numel()))
            rounded = GPTQ().quantize(module.weight.detach(), factors, Integer(), Option(bits, 32)).weight
            module.weight.data = Integer().dequantize(rounded, Option(bits, 32))
    return traces


@pytest.mark.parametrize("bits", [2, 4])
def test_later_blocks_are_measured_on_what_rounded_ones_feed_them(
    bits: int, tiny_model_folder: Folder, tmp_path: Path
) -> None:
    full = _measure(tiny_model_folder(), tmp_path / "full", None)
    behind = _measure(tiny_model_folder(), tmp_path / "behind", bits)
    reference = _reference(tiny_model_folder(), bits)
    assert list(behind) == list(full) == list(reference)
    assert {name: entry.trace for name, entry in behind.items()} == pytest.approx(reference, rel=1e-5)
    later = [name for name in behind if ".layers.0." not in name]
    assert all(behind[name] == full[name] for name in behind if name not in later)
    assert all(behind[name] != full[name] for name in later)
    assert max(abs(behind[name].trace / full[name].trace - 1) for name in later) > 1e-3, "more than what floats do"


def test_errors_are_those_of_the_weights_before_they_are_rounded(tiny_model_folder: Folder, tmp_path: Path) -> None:
    full = _measure(tiny_model_folder(), tmp_path / "full", None, errors=True)
    behind = _measure(tiny_model_folder(), tmp_path / "behind", 4, errors=True)
    assert {name: entry for name, entry in full.items() if ".layers.0." in name} == {
        name: entry for name, entry in behind.items() if ".layers.0." in name
    }
    assert all(0 < entry.errors[OPTIONS[1]] < entry.errors[OPTIONS[0]] for entry in behind.values())


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_an_interrupted_pass_goes_on_behind_rounded_blocks(
    lost: int, tiny_model_folder: Folder, tmp_path: Path
) -> None:
    whole = _measure(tiny_model_folder(), tmp_path, 3, errors=True)
    (tmp_path / "key" / f"{lost:04d}.json").unlink()
    assert _measure(tiny_model_folder(), tmp_path, 3, errors=True) == whole


def test_batches_do_not_matter(tiny_model_folder: Folder, tmp_path: Path) -> None:
    one, all_at_once = (
        _measure(tiny_model_folder(), tmp_path / str(size), 3, batch_size=size, estimator=Attention())
        for size in (1, 4)
    )
    for name, entry in one.items():
        assert entry.trace == pytest.approx(all_at_once[name].trace, rel=1e-2)


@pytest.mark.parametrize("family", ["llama_untied", "gpt2", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("estimator", [Input(), Attention(probes=1)])
def test_heads_experts_and_the_last_layer_of_all(
    estimator: HessianEstimator, family: str, tiny_model_folder: Folder, tmp_path: Path
) -> None:
    """A head that is quantized is measured behind rounded blocks too, and experts without tokens do no harm."""
    folder = tiny_model_folder(family)
    full = _measure(folder, tmp_path / "full", None, estimator=estimator, quantize_head=True)
    behind = _measure(folder, tmp_path / "behind", 4, estimator=estimator, quantize_head=True)
    assert list(behind) == list(full)
    assert behind["lm_head"].trace != full["lm_head"].trace
    assert behind["lm_head"].trace == pytest.approx(full["lm_head"].trace, rel=0.2)
    assert all(entry.trace > 0 for entry in behind.values() if entry.tokens)


def test_layers_that_are_skipped_stay_in_full_precision(tiny_model_folder: Folder, tmp_path: Path) -> None:
    full = _measure(tiny_model_folder(), tmp_path / "full", None, skip=["*.layers.0.*", "*.layers.1.*"])
    behind = _measure(tiny_model_folder(), tmp_path / "behind", 2, skip=["*.layers.0.*", "*.layers.1.*"])
    assert full == behind
    assert full
