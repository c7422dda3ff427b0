"""What plans do to predictions, against whole models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric

from aptq.api import Callback, Option
from aptq.calibration.divergence import measure_divergence
from aptq.calibration.measure import Rounding
from aptq.calibration.walk import Walk
from aptq.formats.integer import Integer
from aptq.hessians.identity import Identity
from aptq.models import open_model, unfuse_experts
from aptq.quantizers.nearest import Nearest
from aptq.settings import ModelSettings

TWO, FOUR = Option(2, 32), Option(4, 32)


def _walk(folder: Path, batch_size: int = 2, **settings: object) -> Walk:
    tokens = torch.randint(4, 260, (5, 9), generator=torch.Generator().manual_seed(1))
    source = open_model(ModelSettings(path=str(folder), **settings))  # type: ignore[arg-type]
    return Walk(source, tokens, batch_size, Fabric(accelerator="cpu", devices=1))


def _measure(walk: Walk, plans: list[dict[str, Option]], samples: int) -> list[float]:
    rounding = Rounding(quantizer=Nearest(), format=Integer())
    return measure_divergence(walk, Identity(), rounding, plans, num_samples=samples, callbacks=Callback())


def _reference(walk: Walk, plan: dict[str, Option], samples: int) -> float:
    original, rounded = walk.source.load_full(), walk.source.load_full()
    unfuse_experts(rounded)
    for name, option in plan.items():
        weight = rounded.get_submodule(name).weight.data
        grid = Integer().fit(weight[None], option)
        rounded.get_submodule(name).weight = torch.nn.Parameter(
            grid.round(weight.T[None], slice(None))[1][0].T.contiguous()
        )
    tokens = walk.samples[:samples]
    with torch.no_grad():
        p, q = (model(tokens, use_cache=False).logits.log_softmax(-1) for model in (original, rounded))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("head", [False, True])
def test_equals_whole_models_that_follow_the_plans(
    family: str, head: bool, tiny_model_folder: Callable[..., Path]
) -> None:
    if head and family == "gemma2":
        pytest.skip("its head is tied: the rounded one is the embedding too in the reference")
    walk = _walk(tiny_model_folder(family), quantize_head=head)
    names = list(walk.source.layer_shapes())
    mixed = {name: (TWO, FOUR)[at % 2] for at, name in enumerate(names)}
    plans = [dict.fromkeys(names, TWO), mixed, dict.fromkeys(names, FOUR)]
    found = _measure(walk, plans, 3)
    assert found == pytest.approx([_reference(walk, plan, 3) for plan in plans], rel=1e-3)
    assert found[0] > found[1] > found[2] > 0


def test_more_samples_than_there_are_and_other_batches_make_no_difference(
    tiny_model_folder: Callable[..., Path],
) -> None:
    folder = tiny_model_folder("llama")
    plan = dict.fromkeys(_walk(folder).source.layer_shapes(), TWO)
    one, other = _measure(_walk(folder, 1), [plan], 5), _measure(_walk(folder, 3), [plan], 50)
    assert one == pytest.approx(other, rel=1e-5)
