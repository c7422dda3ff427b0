"""The two passes over a tiny model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from aptq.api import Callback, Curvature, LayerReport, LayerStatistics, Option, Quantizer
from aptq.calibration.measure import Rounding, measure
from aptq.calibration.quantize import Recipe, quantize, stored_logits
from aptq.calibration.statistics import StatisticsCache, content_key
from aptq.calibration.walk import Step, Walk
from aptq.formats.integer import Integer
from aptq.hessians.attention import Attention
from aptq.hessians.input import Input
from aptq.models import open_model
from aptq.quantizers.factors import Feedback
from aptq.quantizers.gptaq import GPTAQ, GPTAQFactors
from aptq.quantizers.gptq import GPTQ
from aptq.quantizers.nearest import Nearest
from aptq.settings import ModelSettings
from tests.calibration.memory import Memory

OPTIONS = (Option(2, 32), Option(4, 32))
Folder = Callable[..., Path]


def _walk(folder: Path, batch_size: int = 2) -> Walk:
    samples = torch.randint(4, 260, (4, 64), generator=torch.Generator().manual_seed(0))
    return Walk(open_model(ModelSettings(path=str(folder))), samples, batch_size, Fabric(accelerator="cpu", devices=1))


def _measure(walk: Walk, cache: StatisticsCache, rounding: bool = True) -> dict[str, LayerStatistics]:
    return measure(
        walk,
        Input(),
        layers=list(walk.source.layer_shapes()),
        rounding=Rounding(quantizer=GPTQ(), format=Integer(), errors=OPTIONS if rounding else ()),
        cache=cache,
        callbacks=Callback(),
    )


def _recipe(
    walk: Walk, bits: Mapping[str, int] | int = 3, quantizer: Quantizer | None = None, true_sequential: bool = True
) -> Recipe:
    names = walk.source.layer_shapes()
    chosen = dict.fromkeys(names, bits) if isinstance(bits, int) else bits
    plan = {name: Option(each, 32) for name, each in chosen.items()}
    return Recipe(
        estimator=Input(),
        quantizer=quantizer or GPTQ(),
        format=Integer(),
        plan=plan,
        costs={},
        true_sequential=true_sequential,
    )


def _same(a: Memory, b: Memory) -> bool:
    return a.blocks.keys() == b.blocks.keys() and all(
        torch.equal(tensor, b.blocks[index][0][name])
        for index, (tensors, _) in a.blocks.items()
        for name, tensor in tensors.items()
    )


def test_statistics_cover_all_layers_and_more_bits_cost_less(tiny_model_folder: Folder, tmp_path: Path) -> None:
    walk = _walk(tiny_model_folder())
    statistics = _measure(walk, StatisticsCache(tmp_path, "key"))
    assert list(statistics) == list(walk.source.layer_shapes())
    for entry in statistics.values():
        assert entry.trace > 0
        assert 0 < entry.errors[OPTIONS[1]] < entry.errors[OPTIONS[0]]
        assert entry.tokens == 256


def test_cached_statistics_need_no_walk(
    tiny_model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk, cache = _walk(tiny_model_folder()), StatisticsCache(tmp_path, "key")
    first = _measure(walk, cache)
    monkeypatch.setattr(walk, "steps", lambda: pytest.fail("the model was walked again"))
    assert _measure(walk, cache) == first


def test_an_interrupted_pass_goes_on(tiny_model_folder: Folder, tmp_path: Path) -> None:
    cache = StatisticsCache(tmp_path, "key")
    whole = _measure(_walk(tiny_model_folder()), cache)
    (tmp_path / "key" / "0001.json").unlink()
    (tmp_path / "key" / "0002.json").write_text('[{"name": "cut o')
    assert _measure(_walk(tiny_model_folder()), cache) == whole


def test_content_keys_tell_parts_apart() -> None:
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": [2], "a": 1}) != content_key({"a": 1, "b": [3]})


def test_quantize_reports_every_layer_and_beats_nearest(tiny_model_folder: Folder) -> None:
    walk, store = _walk(tiny_model_folder()), Memory()
    reports = quantize(walk, _recipe(walk), store, Callback())
    assert [report.name for report in reports] == list(walk.source.layer_shapes())
    assert all(report.error < report.error_nearest for report in reports)
    assert all(report.storage_bits == pytest.approx(3 + 19 / 32, rel=0.2) for report in reports)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_resuming_gives_the_same_bits(family: str, tiny_model_folder: Folder) -> None:
    walk, whole = _walk(tiny_model_folder(family)), Memory()
    quantize(walk, _recipe(walk), whole, Callback())
    logits = walk.logits()
    for done in (1, 2, 3):
        again, resumed = _walk(tiny_model_folder(family)), Memory()
        resumed.blocks = {index: whole.blocks[index] for index in range(done)}
        quantize(again, _recipe(again), resumed, Callback())
        assert _same(whole, resumed), done
        assert torch.equal(again.logits(), logits), done


def test_later_blocks_see_the_quantized_prefix(tiny_model_folder: Folder) -> None:
    """Fewer bits in block 0 change what block 2 is calibrated on; fewer bits in block 2 leave block 0 alone."""
    folder, stores = tiny_model_folder(), []
    for low in (None, "layers.0.", "layers.2."):
        walk, store = _walk(folder), Memory()
        names = walk.source.layer_shapes()
        bits = {name: 2 if low is not None and low in name else 4 for name in names}
        quantize(walk, _recipe(walk, bits), store, Callback())
        stores.append(store)
    base, early, late = stores
    assert base.blocks[2][1][0].trace != early.blocks[2][1][0].trace
    assert base.blocks[0][1] == [
        _without_time(new, old) for new, old in zip(late.blocks[0][1], base.blocks[0][1], strict=True)
    ]


def _without_time(report: LayerReport, like: LayerReport) -> LayerReport:
    return LayerReport(**{**vars(report), "seconds": like.seconds})


def test_layers_outside_the_plan_stay_as_they_are(tiny_model_folder: Folder) -> None:
    walk, store = _walk(tiny_model_folder()), Memory()
    some = [name for name in walk.source.layer_shapes() if "mlp" in name]
    quantize(walk, _recipe(walk, dict.fromkeys(some, 3)), store, Callback())
    stored = {name.rpartition(".")[0] for tensors, _ in store.blocks.values() for name in tensors}
    assert stored == set(some)


def test_experts_that_no_token_reaches_are_rounded_to_nearest(
    tiny_model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk, store = _walk(tiny_model_folder("mixtral")), Memory()
    steps = walk.steps

    def starved(**options: bool) -> Iterator[Step]:
        for step in steps(**options):
            router = step.block.module.mlp.gate  # type: ignore[union-attr]
            router.weight.data.zero_()  # ties go to the first experts: the last ones starve
            yield step

    monkeypatch.setattr(walk, "steps", starved)
    reports = quantize(walk, _recipe(walk), store, Callback())
    starving = [report for report in reports if report.tokens == 0]
    assert starving
    assert all(report.error == 0.0 for report in starving)


def test_in_sequence_a_layer_sees_the_rounded_ones_before_it_in_its_block(tiny_model_folder: Folder) -> None:
    stores = []
    for true_sequential in (True, False):
        walk, store = _walk(tiny_model_folder()), Memory()
        quantize(walk, _recipe(walk, true_sequential=true_sequential), store, Callback())
        stores.append({report.name.rpartition("layers.0.")[2]: report for report in store.blocks[0][1]})
    one, two = stores
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        assert one[name].error == two[name].error
    for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert one[name].trace != two[name].trace
        assert one[name].trace == pytest.approx(two[name].trace, rel=0.5)


@pytest.mark.parametrize("true_sequential", [True, False])
def test_layers_that_share_their_input_share_its_preparation(true_sequential: bool, tiny_model_folder: Folder) -> None:
    prepared = []

    class Counting(GPTQ):
        def prepare(self, curvature: Curvature) -> Feedback:
            prepared.append(curvature.column.shape)
            return super().prepare(curvature)

    walk = _walk(tiny_model_folder())
    quantize(walk, _recipe(walk, quantizer=Counting(), true_sequential=true_sequential), Memory(), Callback())
    assert len(prepared) == 4 * len(walk.source.block_names), "q, k, v; o; gate, up; down"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("true_sequential", [True, False])
def test_the_walk_goes_on_with_the_rounded_block(family: str, true_sequential: bool, tiny_model_folder: Folder) -> None:
    """Whether it was run once or twice, and in one batch or several."""
    logits = []
    for batch_size in (1, 4):
        walk, store = _walk(tiny_model_folder(family), batch_size), Memory()
        quantize(walk, _recipe(walk, 2, Nearest(), true_sequential), store, Callback())
        again = _walk(tiny_model_folder(family), batch_size)
        quantize(again, _recipe(again, 2, Nearest(), true_sequential), store, Callback())  # restored, then run
        assert torch.equal(walk.logits(), again.logits())
        logits.append(walk.logits())
    assert torch.allclose(*logits, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_behind_the_original_blocks_every_layer_sees_what_pass_1_saw(
    family: str, tiny_model_folder: Folder, tmp_path: Path
) -> None:
    statistics = _measure(_walk(tiny_model_folder(family)), StatisticsCache(tmp_path, "key"), rounding=False)
    walk, store = _walk(tiny_model_folder(family)), Memory()
    recipe = replace(_recipe(walk, bits=2), prefix="full_precision")
    reports = quantize(walk, recipe, store, Callback())
    for report in reports:
        trace = statistics[report.name].trace / statistics[report.name].num_weights
        assert report.trace == trace, report.name
    original = _walk(tiny_model_folder(family))
    for step in original.steps():
        step.run()
    assert torch.equal(walk.logits(), original.logits())
    stored = stored_logits(walk.beginning(1, 64), recipe, store)
    assert (stored - original.logits()).abs().max() > 0.1, "two bits do change a model"
    again, resumed = _walk(tiny_model_folder(family)), Memory()
    resumed.blocks = {0: store.blocks[0], 1: store.blocks[1]}
    quantize(again, recipe, resumed, Callback())
    assert _same(store, resumed)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_stored_blocks_end_in_the_logits_of_the_walk_that_rounded_them(family: str, tiny_model_folder: Folder) -> None:
    walk, store = _walk(tiny_model_folder(family), batch_size=1), Memory()
    quantize(walk, _recipe(walk), store, Callback())
    again = _walk(tiny_model_folder(family))
    assert torch.equal(stored_logits(again.beginning(1, 64), _recipe(walk), store), walk.logits())


class _Keeping(GPTAQ):
    """Remembers the drift of each curvature."""

    def prepare(self, curvature: Curvature) -> GPTAQFactors:
        assert curvature.drift is not None
        self.__dict__.setdefault("kept", []).append(curvature.drift)
        return super().prepare(curvature)


def _layer_inputs(walk: Walk, store: Memory | None) -> dict[str, Tensor]:
    """Return what every layer is called with, ``[samples, tokens, in]``, in the original or in the stored model."""
    seen: dict[str, list[Tensor]] = {}
    for step in walk.steps():
        for name, layer in step.block.layers.items():
            if store is not None:
                option, (tensors, _) = Option(3, 32), store.blocks[step.block.index]
                packed = {key: tensors[f"{name}.{key}"] for key in Integer().packed_layout(option, layer.shape)}
                layer.set_weight(Integer().dequantize(Integer().unpack(packed, option, layer.shape), option))
            layer.module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        step.last = False  # the head is run, too
        step.run()
        for layer in step.block.layers.values():
            layer.module._forward_pre_hooks.clear()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "gpt2", "opt", "gemma2"])
def test_drift_is_the_distance_from_the_full_precision_models_inputs(family: str, tiny_model_folder: Folder) -> None:
    settings = ModelSettings(path=str(tiny_model_folder(family)), quantize_head=True)
    samples = torch.randint(4, 260, (3, 64), generator=torch.Generator().manual_seed(0))
    walks = [Walk(open_model(settings), samples, 2, Fabric(accelerator="cpu", devices=1)) for _ in range(3)]
    quantizer, store = _Keeping(), Memory()
    quantize(walks[0], _recipe(walks[0], quantizer=quantizer), store, Callback())
    full, now = _layer_inputs(walks[1], None), _layer_inputs(walks[2], store)
    kept = iter(quantizer.__dict__["kept"])
    found = 0
    last: Tensor | None = None
    for name in full:  # in the order of the calls
        x = now[name].reshape(-1, now[name].shape[-1]).double()
        expected = 2 * (full[name].reshape(x.shape).double() - x).T @ x / samples.numel()
        if last is None or not torch.equal(expected, last):  # layers that share their inputs share a curvature
            assert torch.allclose(next(kept)[0].double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
            found += 1
        last = expected
    assert next(kept, None) is None
    assert found > 3 * 3, "three blocks and the head"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_resuming_with_drift_gives_the_same_bits(family: str, tiny_model_folder: Folder) -> None:
    walk, whole = _walk(tiny_model_folder(family)), Memory()
    quantize(walk, _recipe(walk, quantizer=GPTAQ()), whole, Callback())
    for done in (1, 3):
        walk, resumed = _walk(tiny_model_folder(family)), Memory()
        resumed.blocks = {index: whole.blocks[index] for index in range(done)}
        quantize(walk, _recipe(walk, quantizer=GPTAQ()), resumed, Callback())
        assert _same(whole, resumed), done
    plain, walk = Memory(), _walk(tiny_model_folder(family))
    quantize(walk, _recipe(walk), plain, Callback())
    assert not _same(plain, whole)


def test_towards_the_original_model_the_outputs_stay_nearer_to_it(tiny_model_folder: Folder) -> None:
    """At the first blocks' ends, on the calibration text, which is what the objective is about."""
    original = _walk(tiny_model_folder())
    for step in original.steps():
        step.run()
    distances = []
    for quantizer in (GPTAQ(alpha=1.0), GPTQ()):
        walk = _walk(tiny_model_folder())
        quantize(walk, _recipe(walk, quantizer=quantizer), Memory(), Callback())
        pairs = zip(walk.last_hidden, original.last_hidden, strict=True)
        distances.append(sum((a - b).square().sum().item() for a, b in pairs))
    assert distances[0] < distances[1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
def test_attention_hessians_go_through_both_passes(family: str, tiny_model_folder: Folder, tmp_path: Path) -> None:
    """A Hessian for each head: in lockstep, block by block for experts, and in the statistics of pass 1."""
    walk, store = _walk(tiny_model_folder(family)), Memory()
    recipe = replace(_recipe(walk), estimator=Attention(probes=1))
    reports = quantize(walk, recipe, store, Callback())
    assert [report.name for report in reports] == list(walk.source.layer_shapes())
    assert sum(report.error for report in reports) < sum(report.error_nearest for report in reports)
    again, resumed = _walk(tiny_model_folder(family)), Memory()
    resumed.blocks = {0: store.blocks[0]}
    quantize(again, replace(recipe, plan=recipe.plan), resumed, Callback())
    assert _same(store, resumed)
    statistics = measure(
        walk,
        Attention(),
        layers=list(walk.source.layer_shapes()),
        rounding=Rounding(quantizer=GPTQ(), format=Integer()),
        cache=StatisticsCache(tmp_path, "key"),
        callbacks=Callback(),
    )
    assert all(entry.trace > 0 for entry in statistics.values() if entry.tokens)


def test_in_turn_and_at_once_the_first_block_has_the_same_attention_hessians(tiny_model_folder: Folder) -> None:
    errors = []
    for true_sequential in (True, False):
        walk, store = _walk(tiny_model_folder()), Memory()
        recipe = replace(_recipe(walk, true_sequential=true_sequential), estimator=Attention())
        quantize(walk, recipe, store, Callback())
        errors.append([report.error for report in store.blocks[0][1][:3]])
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
