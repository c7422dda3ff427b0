"""Gradients taken block by block against those of the whole model."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from aptq.api import AptqError, Block, Callback
from aptq.calibration.backward import token_loss
from aptq.calibration.guidance import measure_guidance
from aptq.calibration.walk import Walk
from aptq.hessians.attention import Attention
from aptq.hessians.loss import Loss
from aptq.models import open_model
from aptq.settings import ModelSettings
from tests.calibration.interrupt import Interrupt, Interrupted


def _walk(folder: Path, batch_size: int = 2, samples: int = 3, **settings: object) -> Walk:
    tokens = torch.randint(4, 260, (samples, 7), generator=torch.Generator().manual_seed(1))
    source = open_model(ModelSettings(path=str(folder), **settings))  # type: ignore[arg-type]
    return Walk(source, tokens, batch_size, Fabric(accelerator="cpu", devices=1))


def _reference(walk: Walk, wanted: Mapping[str, int]) -> dict[str, Tensor]:
    """Differentiate the whole model's own loss."""
    model = walk.source.load_full()
    squares: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for sample in walk.samples:
        found: dict[str, Tensor] = {}

        def keep(name: str, found: dict[str, Tensor] = found) -> Callable[..., None]:
            return lambda _, args, output: found.update({name: output[0] if isinstance(output, tuple) else output})

        handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in wanted]
        embedded = model.get_input_embeddings()(sample[None]).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], sample[1:], reduction="sum")
        gradients = torch.autograd.grad(loss, [found[name] for name in wanted])
        for (name, groups), gradient in zip(wanted.items(), gradients, strict=True):
            squares[name].append(gradient.reshape(len(sample), groups, -1).square().mean(-1))
        for handle in handles:
            handle.remove()
    return {name: torch.stack(each) for name, each in squares.items()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "qwen3"])
@pytest.mark.parametrize("estimator", [Loss(groups=4), Attention(mlp=True, tokens="loss")])
def test_equals_the_gradients_of_the_whole_model(
    family: str, estimator: Loss | Attention, tiny_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    walk = _walk(tiny_model_folder(family))
    guidance = measure_guidance(walk, estimator, tmp_path, Callback())
    blocks = range(len(walk.source.block_names))
    found = {name: each for index in blocks for name, each in guidance(index).items()}
    wanted = {
        name: groups
        for index in blocks
        for name, groups in estimator.guides(walk.source.load_block(index, "cpu")).items()
    }
    expected = _reference(walk, wanted)
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert each.any()
        assert torch.allclose(found[name], each, rtol=1e-3, atol=1e-3 * each.max().item()), name
    assert sorted({path.name.split("-")[0] for path in tmp_path.iterdir()}) == ["squares"]


def test_batches_make_no_difference(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model_folder("llama")
    one, three = (
        measure_guidance(_walk(folder, size), Loss(labels="model"), tmp_path / str(size), Callback()) for size in (1, 3)
    )
    for name, squares in one(1).items():
        assert torch.allclose(squares, three(1)[name], rtol=1e-4, atol=1e-9)


def test_a_quantized_head_is_guided_too(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    walk = _walk(tiny_model_folder("llama"), quantize_head=True)
    head = measure_guidance(walk, Loss(groups=1), tmp_path, Callback())(len(walk.source.block_names))
    assert list(head) == ["lm_head"]
    assert head["lm_head"].shape == (3, 7, 1)
    assert head["lm_head"][:, :-1].all()
    assert not head["lm_head"][:, -1].any(), "nothing follows the last token"


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_an_interrupted_pass_goes_on(at: int, tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model_folder("llama")
    blocks = len(_walk(folder).source.block_names)
    expected = measure_guidance(_walk(folder), Loss(), tmp_path / "whole", Callback())
    with pytest.raises(Interrupted):
        measure_guidance(_walk(folder), Loss(), tmp_path / "cut", Interrupt(at=at))
    rest = Interrupt()
    found = measure_guidance(_walk(folder), Loss(), tmp_path / "cut", rest)
    assert rest.begun == (2 * blocks if at < blocks else 2 * blocks - at)
    for index in range(blocks):
        assert all(torch.equal(each, expected(index)[name]) for name, each in found(index).items())
    again = Interrupt()
    measure_guidance(_walk(folder), Loss(), tmp_path / "cut", again)
    assert again.begun == 0


def test_labels_of_the_model_are_drawn_from_its_predictions() -> None:
    logits = torch.tensor([[[0.0, 50.0], [50.0, 0.0], [0.0, 50.0]]])
    tokens = torch.tensor([[0, 1, 1]])
    assert token_loss(logits, tokens, "model", (0, 0)) < 1e-6, "all three, the last one included"
    assert token_loss(logits, tokens, "data", (0, 0)) == pytest.approx(50.0)


def test_mixtures_of_experts_are_refused(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    walk = _walk(tiny_model_folder("mixtral"))
    with pytest.raises(AptqError, match="mixture of experts"):
        measure_guidance(walk, Loss(), tmp_path, Callback())


def test_a_module_that_is_never_called_is_an_error(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    class Elsewhere(Loss):
        def guides(self, block: Block) -> Mapping[str, int]:
            block.module.unused = torch.nn.Linear(2, 2)
            return {f"{block.name}.unused": 1}

    with pytest.raises(AptqError, match="unused is not called"):
        measure_guidance(_walk(tiny_model_folder("llama")), Elsewhere(), tmp_path, Callback())


def test_labels_of_both_kinds_give_the_mean_of_each(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model_folder("llama")
    both, model, data = (
        measure_guidance(_walk(folder), Loss(labels=labels), tmp_path / labels, Callback())(0)
        for labels in ("both", "model", "data")
    )
    for name, squares in both.items():
        assert torch.allclose(squares, (model[name] + data[name]) / 2, rtol=1e-4, atol=1e-9)
