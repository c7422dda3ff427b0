"""What the loss makes of rounding, against the gradients of the whole model."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from aptq.api import Callback, LayerStatistics, Option
from aptq.calibration.backward import LOSSES, Seen, token_loss
from aptq.calibration.measure import Rounding, measure
from aptq.calibration.roundings import Roundings
from aptq.calibration.score import loss_changes, score
from aptq.calibration.statistics import StatisticsCache
from aptq.calibration.walk import Walk
from aptq.formats.integer import Integer
from aptq.hessians.identity import Identity
from aptq.metrics.gradient import Gradient
from aptq.metrics.output import Output
from aptq.models import open_model
from aptq.quantizers.nearest import Nearest
from aptq.settings import ModelSettings
from tests.calibration.interrupt import Interrupt, Interrupted

OPTIONS = (Option(2, 32), Option(4, 32))
ROUNDING = Rounding(quantizer=Nearest(), format=Integer(), errors=OPTIONS)
Folder = Callable[..., Path]


def _walk(folder: Path, batch_size: int = 2, **settings: object) -> Walk:
    tokens = torch.randint(4, 260, (5, 7), generator=torch.Generator().manual_seed(1))
    source = open_model(ModelSettings(path=str(folder), **settings))  # type: ignore[arg-type]
    return Walk(source, tokens, batch_size, Fabric(accelerator="cpu", devices=1))


def _score(
    walk: Walk, folder: Path, metric: Output | Gradient, callbacks: Callback | None = None
) -> dict[str, LayerStatistics]:
    roundings, cache = Roundings(folder / "roundings", walk.fabric), StatisticsCache(folder, "scored")
    statistics = measure(
        walk,
        Identity(),
        layers=list(walk.source.layer_shapes()),
        rounding=ROUNDING,
        cache=StatisticsCache(folder, "measured"),
        callbacks=Callback(),
        roundings=roundings,
    )
    score(
        walk,
        metric,
        statistics,
        coding=ROUNDING.coding,
        roundings=roundings,
        cache=cache,
        callbacks=callbacks or Callback(),
        stage="gradients",
    )
    found = cache.load_all(walk.source.num_steps)
    assert found is not None
    for name, entry in statistics.items():
        assert replace(found[name], loss_changes={}) == entry
    return found


def _keep(
    found: dict[str, tuple[Tensor, Tensor]], name: str, module: torch.nn.Module, args: tuple[Tensor], output: Tensor
) -> None:
    found[name] = (args[0], output)


def _reference(walk: Walk, metric: Output | Gradient) -> dict[Option, dict[str, tuple[float, float, float]]]:
    """Differentiate the whole model's own loss, layer by layer from the definition."""
    model = walk.source.load_full().double()
    names = list(walk.source.layer_shapes())
    sums = {option: {name: torch.zeros(3, dtype=torch.float64) for name in names} for option in OPTIONS}
    differences = {option: {name: _difference(model.get_submodule(name), option) for name in names} for option in sums}
    samples, kinds = walk.samples[: metric.samples], LOSSES[metric.labels]
    for (number, sample), kind in product(enumerate(samples), kinds):
        found: dict[str, tuple[Tensor, Tensor]] = {}

        handles = [model.get_submodule(name).register_forward_hook(partial(_keep, found, name)) for name in names]
        embedded = model.get_input_embeddings()(sample[None]).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        loss = token_loss(logits, sample[None], kind, (metric.seed, number))
        gradients = torch.autograd.grad(loss, [output for _, output in found.values()])
        for (name, (x, _)), gradient in zip(found.items(), gradients, strict=True):
            for option, difference in ((option, differences[option][name]) for option in OPTIONS):
                for x_t, g_t in zip(x[0], gradient[0], strict=True):
                    move = g_t * (difference @ x_t)
                    sums[option][name][0] += (move**2).sum() / 2
                    sums[option][name][1] += move.sum() ** 2 / 2
                sums[option][name][2] += ((gradient[0].T @ x[0]) * difference).abs().sum()
        for handle in handles:
            handle.remove()
    tokens = samples.numel() * len(kinds)
    return {option: {name: tuple((each / tokens).tolist()) for name, each in of.items()} for option, of in sums.items()}  # type: ignore[misc]


def _difference(layer: torch.nn.Module, option: Option) -> Tensor:
    weight = layer.weight.detach()
    grid = Integer().fit(weight.float()[None], option)
    return weight - grid.round(weight.float().T[None], slice(None))[1][0].T


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("metric", [Output(samples=3, seed=4), Output(samples=3, labels="model"), Gradient(samples=9)])
def test_equals_the_definition_on_the_whole_model(
    family: str, metric: Output | Gradient, tiny_model_folder: Folder, tmp_path: Path
) -> None:
    walk = _walk(tiny_model_folder(family))
    found = _score(walk, tmp_path, metric)
    assert list(found) == list(walk.source.layer_shapes())
    for option, reference in _reference(walk, metric).items():
        for name, expected in reference.items():
            change = found[name].loss_changes[option]
            assert (change.channels, change.tokens) == pytest.approx(expected[:2], rel=2e-3), name
            assert change.absolute == (pytest.approx(expected[2], rel=2e-3) if metric.needs_absolute else None), name
    assert [path.parent.name for path in tmp_path.rglob("*.safetensors")] == ["roundings"] * len(
        walk.source.block_names
    )


def test_batches_make_no_difference(tiny_model_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_model_folder("llama")
    one, three = (_score(_walk(folder, size), tmp_path / str(size), Gradient(samples=4)) for size in (1, 3))
    assert one == three


def test_a_quantized_head_is_scored_too(tiny_model_folder: Folder, tmp_path: Path) -> None:
    walk = _walk(tiny_model_folder("llama"), quantize_head=True)
    metric = Output(samples=2)
    change = _score(walk, tmp_path, metric)["lm_head"].loss_changes[OPTIONS[0]]
    expected = _reference(walk, metric)[OPTIONS[0]]["lm_head"]
    assert (change.channels, change.tokens) == pytest.approx(expected[:2], rel=2e-3)


def test_experts_are_scored_on_the_tokens_that_they_see(tiny_model_folder: Folder, tmp_path: Path) -> None:
    found = _score(_walk(tiny_model_folder("mixtral")), tmp_path, Output())
    changes = [entry.loss_changes[OPTIONS[0]].channels for name, entry in found.items() if "experts" in name]
    assert len(changes) > 4
    assert all(each >= 0 for each in changes)
    assert sum(each > 0 for each in changes) > len(changes) / 2


def test_loss_changes_are_quadratic_and_linear_in_the_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    x, g, d = (torch.randn(*shape, generator=generator) for shape in ((1, 6, 5), (1, 6, 4), (4, 5)))
    once, twice = loss_changes([Seen(x, g[None])], [d, -2 * d])
    assert twice.tolist() == pytest.approx((torch.tensor([4, 4, 2]) * once).tolist())


@pytest.mark.parametrize("metric", [Output(samples=5), Gradient(samples=5)])
def test_it_is_the_same_whatever_is_scored_together(
    metric: Output | Gradient, tiny_model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model_folder("llama")
    together = _score(_walk(folder), tmp_path / "together", metric)
    monkeypatch.setattr("aptq.calibration.score._TOKENS", 1)
    for name, entry in _score(_walk(folder), tmp_path / "apart", metric).items():
        for option in OPTIONS:
            one, other = (each.loss_changes[option] for each in (entry, together[name]))
            assert one.channels == pytest.approx(other.channels, rel=1e-6)
            assert (one.absolute or 0) == pytest.approx(other.absolute or 0, rel=1e-6)


def test_an_interrupted_pass_goes_on(tiny_model_folder: Folder, tmp_path: Path) -> None:
    folder, metric = tiny_model_folder("llama"), Output(samples=2)
    expected = _score(_walk(folder), tmp_path / "whole", metric)
    for at in (1, 3, 5):
        cut = tmp_path / f"cut at {at}"
        with pytest.raises(Interrupted):
            _score(_walk(folder), cut, metric, Interrupt(at=at))
        assert _score(_walk(folder), cut, metric) == expected, at


def test_statistics_that_are_gone_are_measured_anew(tiny_model_folder: Folder, tmp_path: Path) -> None:
    folder, metric = tiny_model_folder("llama"), Output(samples=2)
    expected = _score(_walk(folder), tmp_path / "whole", metric)
    blocks = len(_walk(folder).source.block_names)
    with pytest.raises(Interrupted):
        _score(_walk(folder), tmp_path / "cut", metric, Interrupt(at=2 * blocks - 1))
    next((tmp_path / "cut" / "scored").rglob("*.json")).unlink()
    assert _score(_walk(folder), tmp_path / "cut", metric) == expected


def test_labels_of_both_kinds_give_the_mean_of_each(tiny_model_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_model_folder("llama")
    found = {
        labels: _score(_walk(folder), tmp_path / labels, Output(samples=3, labels=labels))
        for labels in ("both", "model", "data")
    }
    for name, entry in found["both"].items():
        each = [found[labels][name].loss_changes[OPTIONS[0]].channels for labels in ("model", "data")]
        assert each[0] != each[1]
        assert entry.loss_changes[OPTIONS[0]].channels == pytest.approx(sum(each) / 2, rel=1e-4)
