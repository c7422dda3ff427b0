"""APTQ's Hessian against dense Jacobians in float64, on the attention modules of transformers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.func import functional_call

from aptq.api import AptqError, Block, BlockInputs, CurvatureSum
from aptq.calibration.walk import Walk
from aptq.hessians.attention import Attention
from aptq.hessians.input import Input
from aptq.models import open_model
from aptq.models.structure import LinearLayer, find_attentions, find_layers, find_mlps
from aptq.settings import ModelSettings
from aptq.testing import check_hessian
from aptq.testing.models import tiny_block

# Rotary embeddings, grouped queries; biases; norms of queries and keys; sliding windows; soft caps; partial rotary
# embeddings; learned positions; one matrix for queries, keys and values.
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi", "opt", "gpt2")
TOKENS = 6


@dataclass(frozen=True, eq=False)
class Case:
    """The first block of a tiny model, in float64, with attention that is far from even."""

    block: Block
    inputs: BlockInputs

    @property
    def attention(self) -> tuple[str, nn.Module]:
        ((name, module),) = find_attentions(self.block.module).items()
        return f"{self.block.name}.{name}", module

    def sums(self, estimator: Attention) -> dict[str, CurvatureSum]:
        with torch.no_grad(), estimator.observe(self.block) as observer:
            observer(self.inputs)
        return dict(observer.sums())

    def measured(self) -> dict[str, nn.Module]:
        """Return the layers of the attention module but the output layer."""
        name, module = self.attention
        return {each: layer.module for each, layer in list(find_layers(module, name).items())[:-1]}


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_double(each) for each in value)
    return value


@pytest.fixture
def case(tiny_model_folder: Callable[..., Path]) -> Iterator[Callable[..., Case]]:
    walks = []

    def make(family: str, samples: int = 1, tokens: int = TOKENS) -> Case:
        ids = torch.randint(4, 260, (samples, tokens), generator=torch.Generator().manual_seed(1))
        options = {"sliding_window": 3} if family in ("mistral", "gemma2") else {}
        source = open_model(ModelSettings(path=str(tiny_model_folder(family, **options))))
        walks.append(Walk(source, ids, samples, Fabric(accelerator="cpu", devices=1)).steps())
        step = next(walks[-1])
        step.block.module.double()
        batch = step.inputs[0]
        inputs = replace(
            batch, hidden=_double(batch.hidden), kwargs={key: _double(value) for key, value in batch.kwargs.items()}
        )
        made = Case(step.block, inputs)
        torch.manual_seed(0)
        for parameter in made.attention[1].parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return made

    yield make
    for walk in walks:
        walk.close()


def _reference(
    case: Case, name: str, part: tuple[str, nn.Module] | None = None, weights: Tensor | None = None
) -> Tensor:
    """Return ``2 J^T J`` summed over the rows of each head and divided by their number: ``[heads, in, in]``.

    With ``weights [tokens]``, ``J^T diag(w) J``.
    """
    by_head = _jacobian(case, name, part)
    if weights is not None:
        by_token = by_head.unflatten(0, (len(weights), -1))
        by_head = (by_token * (weights / 2).sqrt()[:, None, None, None, None]).flatten(0, 1)
    return 2 * torch.einsum("phai,phaj->hij", by_head, by_head) / by_head.shape[2]


def _row_reference(case: Case, name: str) -> Tensor:
    """Return ``2 J^T J`` summed over the columns and divided by their number: ``[heads, rows, rows]``."""
    by_head = _jacobian(case, name, None)
    return 2 * torch.einsum("phai,phbi->hab", by_head, by_head) / by_head.shape[3]


def _jacobian(case: Case, name: str, part: tuple[str, nn.Module] | None) -> Tensor:
    """Return the derivatives of the module's outputs by a layer's weight: ``[outputs, heads, rows, in]``."""
    prefix, module = part or case.attention
    called: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: called.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        case.inputs.run(case.block.module)
    handle.remove()
    args, kwargs = called[0]
    key = f"{name.removeprefix(prefix + '.')}.weight"

    def output(weight: Tensor) -> Tensor:
        found = functional_call(module, {key: weight}, args, kwargs)
        return (found[0] if isinstance(found, tuple) else found).flatten()

    weight = module.get_parameter(key).detach()
    jacobian = torch.autograd.functional.jacobian(output, weight)
    if not isinstance(module.get_submodule(name.removeprefix(prefix + ".")), nn.Linear):
        jacobian = jacobian.transpose(1, 2)  # Conv1D
    by_head: Tensor = jacobian.unflatten(1, (-1, module.head_dim if part is None else jacobian.shape[1]))
    return by_head


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("values", ["exact", "random"])
def test_equals_the_dense_gauss_newton_matrix(family: str, values: str, case: Callable[..., Case]) -> None:
    made = case(family)
    sums = made.sums(Attention(cotangent="exact", values=values))
    for name in made.measured():
        assert _relative(sums[name].column, _reference(made, name)) < 1e-10
        assert torch.equal(sums[name].column, sums[name].column.transpose(1, 2))
        row = sums[name].row
        assert row is not None
        expected = _row_reference(made, name)
        shared = made.attention[1].config.num_attention_heads != len(expected)
        if values == "exact" and "v_proj" in name and shared:  # several query heads use a value: rows count alike
            expected = expected.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(expected.shape[1])
        assert _relative(row, expected) < 1e-10
        assert sums[name].tokens == TOKENS


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt2"])
def test_feed_forward_modules_are_measured_at_their_output(family: str, case: Callable[..., Case]) -> None:
    made = case(family, tokens=3)
    sums = made.sums(Attention(cotangent="exact", mlp=True))
    ((name, module),) = find_mlps(made.block.module).items()
    prefix = f"{made.block.name}.{name}"
    *before, last = find_layers(module, prefix)
    for each in before:
        assert _relative(sums[each].column, _reference(made, each, (prefix, module))) < 1e-10
    assert torch.equal(sums[last].column, made.sums(Attention())[last].column)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt2"])
@pytest.mark.parametrize("values", ["exact", "random"])
def test_tokens_weigh_as_the_loss_minds_them(family: str, values: str, case: Callable[..., Case]) -> None:
    made = case(family, tokens=4)
    name, module = made.attention
    estimator = Attention(cotangent="exact", values=values, mlp=True, tokens="loss")
    parts = [(name, module)]
    parts += [(f"{made.block.name}.{each}", mlp) for each, mlp in find_mlps(made.block.module).items()]
    guidance = {each: torch.rand(1, 4, 1, dtype=torch.float64) for each, _ in parts}
    guided = replace(made, block=replace(made.block, guidance=guidance))
    sums = guided.sums(estimator)
    for part in parts:
        *before, last = find_layers(part[1], part[0])
        for each in before:  # Gemma's softmax is in float32
            expected = _reference(made, each, None if part[0] == name else part, guidance[part[0]].flatten())
            assert _relative(sums[each].column, expected) < 1e-6
        rows = sums[last].column.shape[0]
        assert rows == 1
        expected = _reference(made, last, part, guidance[part[0]].flatten())
        assert _relative(sums[last].column, expected) < 1e-6


def test_token_weights_have_to_be_known_and_to_serve_all_layers() -> None:
    with (
        pytest.raises(AptqError, match="have to be taken"),
        Attention(mlp=True, tokens="loss").observe(tiny_block(attention=True)),
    ):
        pass
    with pytest.raises(AptqError, match="hessian.mlp=true"):
        Attention(tokens="loss")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_closed_form_of_the_values_needs_no_luck(family: str, case: Callable[..., Case]) -> None:
    made = case(family)
    sums = made.sums(Attention(probes=1))
    name = list(made.measured())[-1] if family != "opt" else next(each for each in made.measured() if "v_proj" in each)
    heads = slice(2 * made.attention[1].num_heads, None) if family == "gpt2" else slice(None)
    assert _relative(sums[name].column[heads], _reference(made, name)[heads]) < 1e-10


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_random_cotangents_are_right_on_average_and_ones_are_not(family: str, case: Callable[..., Case]) -> None:
    made = case(family)
    trials = [made.sums(Attention(probes=1, values="random", seed=seed)) for seed in range(300)]
    ones = made.sums(Attention(cotangent="ones"))
    for name in made.measured():
        drawn, expected = torch.stack([sums[name].column for sums in trials]), _reference(made, name)
        error = (drawn.mean(0) - expected).abs()
        sigma = drawn.std(0) / len(trials) ** 0.5
        assert (error <= 3 * sigma + 1e-12).double().mean() > 0.98
        assert _relative(drawn.mean(0), expected) < 0.15
        assert (((ones[name].column - expected).abs() <= 3 * sigma + 1e-12).double().mean()) < 0.9


@pytest.mark.parametrize("layer", ["q_proj", "k_proj"])
def test_more_probes_are_nearer(layer: str, case: Callable[..., Case]) -> None:
    made = case("llama", tokens=12)
    name = next(name for name in made.measured() if layer in name)
    expected = _reference(made, name)

    def error(probes: int) -> float:
        found = [made.sums(Attention(probes=probes, seed=seed))[name].column for seed in range(8)]
        return sum(_relative(column, expected) for column in found) / len(found)

    assert error(64) < 0.35 * error(2)


def test_the_output_layer_has_the_hessian_of_its_inputs(case: Callable[..., Case]) -> None:
    made = case("llama")
    with torch.no_grad(), Input().observe(made.block) as observer:
        observer(made.inputs)
    expected, found = observer.sums(), made.sums(Attention())
    others = found.keys() - made.measured().keys()
    assert len(others) == 4
    assert all(torch.equal(found[name].column, expected[name].column) for name in others)


def test_one_hessian_for_the_layer_is_the_mean_of_the_heads(case: Callable[..., Case]) -> None:
    made = case("llama")
    by_head = made.sums(Attention(scope="head"))
    whole = made.sums(Attention(scope="layer"))
    for name in made.measured():
        assert whole[name].column.shape[0] == 1
        assert torch.allclose(whole[name].column[0], by_head[name].column.mean(0), rtol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize(
    "options", [{}, {"scope": "layer"}, {"values": "random"}, {"cotangent": "ones"}, {"mlp": True}]
)
def test_keeps_the_contract(family: str, options: dict[str, Any], case: Callable[..., Case]) -> None:
    made = case(family, samples=3, tokens=9)
    check_hessian(Attention(**options), block=made.block, inputs=made.inputs)


def test_the_first_token_says_nothing_about_queries(case: Callable[..., Case]) -> None:
    """It attends to itself alone, whatever the query."""
    made = case("llama", tokens=2)
    first = made.sums(Attention())
    x = made.inputs.hidden.clone()
    name = next(name for name in made.measured() if "q_proj" in name)
    rank = torch.linalg.matrix_rank(first[name].column[0]).item()
    assert x.shape[1] == 2
    assert rank == 1


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_the_objective_changes_as_the_hessian_says(family: str, case: Callable[..., Case]) -> None:
    """``||F(W + e D) - F(W)||^2`` tends to ``e^2 tr(D H D^T) / 2``, taken over all signs of the rows of ``D = u v^T``.

    Sums over the rows of a Hadamard matrix leave nothing of the products of two rows, as the Hessian does.
    """
    made = case(family)
    prefix, module = made.attention
    sums = made.sums(Attention(cotangent="exact"))
    signs = torch.ones(1, 1, dtype=torch.float64)
    while len(signs) < module.head_dim:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    for name, total in sums.items():
        if name in made.measured():
            direction = torch.randn(
                total.column.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0)
            )
            head = total.column.shape[0] - 1
            expected = 0.5 * module.head_dim * (direction @ total.column[head] @ direction)
            ratios = []
            for step in (1e-1, 1e-2, 1e-3):
                changes = [
                    _change(made, name, head, step * torch.outer(row[: module.head_dim], direction)) for row in signs
                ]
                ratios.append((sum(changes) / len(changes) / (step**2 * expected)).item())
            assert abs(ratios[2] - 1) < 1e-2
            assert abs(ratios[2] - 1) <= abs(ratios[0] - 1) + 1e-6


def _change(case: Case, name: str, head: int, difference: Tensor) -> Tensor:
    """Return ``||F(W + D) - F(W)||^2`` for a change of one head's rows."""
    layer, module = case.block.layers[name], case.attention[1]
    outputs = []
    handle = module.register_forward_hook(lambda _, args, output: outputs.append(output[0]))
    before = layer.weight().clone()
    rows = slice(head * module.head_dim, (head + 1) * module.head_dim)
    with torch.no_grad():
        case.inputs.run(case.block.module)
        changed = before.clone()
        changed[rows] += difference
        layer.set_weight(changed)
        case.inputs.run(case.block.module)
        layer.set_weight(before)
    handle.remove()
    return (outputs[1] - outputs[0]).square().sum()


@pytest.mark.parametrize("options", [{"probes": 1}, {"probes": 2, "values": "random"}, {"cotangent": "ones"}])
def test_rows_and_columns_have_one_trace(options: dict[str, Any], case: Callable[..., Case]) -> None:
    made = case("qwen3", samples=2)
    sums = made.sums(Attention(**options))
    for name in made.measured():
        total = sums[name]
        assert total.row is not None
        column = total.column.diagonal(dim1=1, dim2=2).sum(1) * total.row.shape[1]
        row = total.row.diagonal(dim1=1, dim2=2).sum(1) * total.column.shape[1]
        assert torch.allclose(column, row, rtol=1e-9)


def test_attention_without_its_causal_mask_is_refused(case: Callable[..., Case]) -> None:
    made = case("llama")
    made.attention[1].is_causal = False
    bare = replace(made, inputs=replace(made.inputs, kwargs={**made.inputs.kwargs, "attention_mask": None}))
    with pytest.raises(AptqError, match="causal mask is missing"):
        bare.sums(Attention())


def test_a_block_without_attention_is_refused() -> None:
    with pytest.raises(AptqError, match="has no attention module"), Attention().observe(tiny_block()):
        pass


def test_a_head_has_the_hessian_of_its_inputs() -> None:
    module = nn.Linear(8, 20, bias=False)
    block = Block(index=3, name="lm_head", module=module, layers={"lm_head": LinearLayer("lm_head", module)})
    inputs = BlockInputs(hidden=torch.randn(2, 5, 8), args=(), kwargs={})
    sums = []
    for estimator in (Attention(), Input()):
        with torch.no_grad(), estimator.observe(block) as observer:
            observer(inputs)
        sums.append(observer.sums()["lm_head"])
    assert torch.equal(sums[0].column, sums[1].column)
    assert sums[0].tokens == sums[1].tokens == 10


@pytest.mark.parametrize("options", [{"probes": 0}, {"scope": "row"}, {"values": "none"}, {"cotangent": "zeros"}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(AptqError, match=f"hessian.{next(iter(options))}"):
        Attention(**options)
