"""Do estimators keep their promises on a running block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from aptq.api import (
    Block,
    BlockInputs,
    CurvatureSum,
    DriftEstimator,
    GuidedEstimator,
    HessianEstimator,
    Layer,
    SequentialEstimator,
)
from aptq.models.structure import LinearLayer
from aptq.testing.assertions import expect, expect_equal

__all__ = ["check_hessian", "hooks_of", "tiny_block", "tiny_inputs"]


class TinyAttention(nn.Module):
    """Causal attention: several heads of queries, one of keys and values."""

    head_dim = 8

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.head_dim, bias=True)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what is added to the hidden states ``[samples, tokens, width]``."""
        projected = (self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden))
        query, key, value = (each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in projected)
        key, value = (each.expand(-1, query.shape[1], -1, -1) for each in (key, value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output


class TinyBlock(nn.Module):
    """A gated network with a residual, maybe behind an attention: two layers share an input, a third has its own."""

    def __init__(self, width: int, hidden: int, attention: bool) -> None:
        super().__init__()
        self.attention = TinyAttention(width) if attention else None
        self.norm = nn.LayerNorm(width)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=True)

    def forward(self, hidden: Tensor, scale: float = 1.0) -> tuple[Tensor]:
        """Return the new hidden states in a tuple, as many decoders do."""
        if self.attention is not None:
            hidden = hidden + self.attention(hidden)
        x = self.norm(hidden)
        return (hidden + scale * self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)),)


def tiny_block(width: int = 24, hidden: int = 40, attention: bool = False) -> Block:
    """Return a seeded block of three linear layers, and four more where it has an attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = TinyBlock(width, hidden, attention).eval()
    layers: dict[str, Layer] = {
        f"model.layers.0.{name}": LinearLayer(f"model.layers.0.{name}", child)
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear)
    }
    return Block(index=0, name="model.layers.0", module=module, layers=layers)


def tiny_inputs(width: int = 24, samples: int = 6, tokens: int = 16) -> BlockInputs:
    """Return seeded hidden states for ``tiny_block``."""
    generator = torch.Generator().manual_seed(1)
    return BlockInputs(hidden=torch.randn(samples, tokens, width, generator=generator), args=(), kwargs={"scale": 0.5})


# --------------------------------------------------------------------------------------------------- estimators


def check_hessian(
    estimator: HessianEstimator, *, block: Block | None = None, inputs: BlockInputs | None = None
) -> None:
    """Check an estimator on a block: a tiny one with an attention and a gated network, or your own.

    Args:
        estimator: the component.
        block: a block in evaluation mode.
        inputs: one batch of at least two samples for it; its arguments must fit any number of samples.

    Raises:
        AssertionError: a promise of ``aptq.api.HessianEstimator`` is broken.
    """
    block, inputs = block or tiny_block(attention=True), inputs or tiny_inputs()
    if isinstance(estimator, GuidedEstimator) and estimator.labels is not None and not block.guidance:
        block = _guided(estimator, block, inputs)
    expect(inputs.hidden.shape[0] >= 2, "Give at least two samples, so that batching can be told.")
    together = _observe(estimator, block, [inputs])
    _check_sums(together, block, tokens=inputs.hidden.shape[0] * inputs.hidden.shape[1])
    one_by_one = _observe(estimator, block, _split(inputs, 1))
    _check_close(one_by_one, together, "samples one by one instead of in one batch")
    first, *rest = _split(inputs, (inputs.hidden.shape[0] + 1) // 2)
    ranks = [_observe(estimator, block, [first]), _observe(estimator, block, rest)]
    _check_close({name: _added([rank[name] for rank in ranks]) for name in together}, together, "split over two ranks")
    with torch.no_grad(), estimator.observe(block, need_outputs=False) as observer:
        for batch in _split(inputs, 1):
            observer(batch)
        _check_close(observer.sums(), one_by_one, "without need for outputs")
    if isinstance(estimator, SequentialEstimator):
        _check_close(_from_inputs(estimator, block, _split(inputs, 1)), together, "from layer to layer")
    if isinstance(estimator, DriftEstimator) and estimator.gives_drift:
        _check_drift(estimator, block, inputs)
    _check_failure(estimator, block, inputs)


def _check_drift(estimator: DriftEstimator, block: Block, inputs: BlockInputs) -> None:
    """Inputs that are the same have none; where the original ones were twice as large, it is the curvature itself."""
    for scale, size in ((1.0, 1), (2.0, 1), (2.0, inputs.hidden.shape[0])):
        batches = _split(inputs, size)
        samples = [batch.samples for batch in batches]
        with torch.no_grad(), estimator.watch(block) as observer:
            seen = _layer_inputs(block, batches)
            for name, layer in block.layers.items():
                total = observer.curvature_sum(layer, seen[name], samples, [scale * x for x in seen[name]])
                assert total.drift is not None, f"{name}: gives_drift is true, and there is no drift."
                expect(total.drift.shape == total.column.shape, f"{name}: drift is {tuple(total.drift.shape)}.")
                error = (total.drift - (scale - 1) * total.column).abs().max() / total.column.abs().max()
                expect(bool(error <= 1e-4), f"{name}: drift of {scale:g} x instead of x is off by {float(error):.3g}.")


def _guided(estimator: GuidedEstimator, block: Block, inputs: BlockInputs) -> Block:
    """Leave gradients with a block, as the engine does: drawn ones."""
    generator = torch.Generator().manual_seed(7)
    shape = (max(inputs.samples or range(len(inputs.hidden))) + 1, inputs.hidden.shape[1])
    wanted = estimator.guides(block)
    return replace(
        block, guidance={name: torch.rand(*shape, groups, generator=generator) for name, groups in wanted.items()}
    )


def _from_inputs(
    estimator: SequentialEstimator, block: Block, batches: Sequence[BlockInputs]
) -> dict[str, CurvatureSum]:
    with torch.no_grad(), estimator.watch(block) as observer:
        seen, samples = _layer_inputs(block, batches), [batch.samples for batch in batches]
        return {name: observer.curvature_sum(layer, seen[name], samples) for name, layer in block.layers.items()}


def _layer_inputs(block: Block, batches: Sequence[BlockInputs]) -> dict[str, list[Tensor]]:
    """Run a block; return what each of its layers is called with, by batch."""
    seen: dict[str, list[Tensor]] = {name: [] for name in block.layers}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: seen[name].append(args[0])

    handles = [layer.module.register_forward_pre_hook(keep(name)) for name, layer in block.layers.items()]
    for batch in batches:
        batch.run(block.module)
    for handle in handles:
        handle.remove()
    return seen


def _split(inputs: BlockInputs, size: int) -> list[BlockInputs]:
    samples = inputs.samples or range(len(inputs.hidden))
    return [
        replace(inputs, hidden=part, samples=samples[number * size : (number + 1) * size])
        for number, part in enumerate(inputs.hidden.split(size))
    ]


def _observe(estimator: HessianEstimator, block: Block, batches: Sequence[BlockInputs]) -> dict[str, CurvatureSum]:
    """Return copies of the sums, after checking that observing changed nothing else."""
    hooks, weights = hooks_of(block.module), {name: each.clone() for name, each in block.module.state_dict().items()}
    with torch.no_grad():
        expected = [batch.run(block.module) for batch in batches]
    given = [batch.hidden.clone() for batch in batches]
    with torch.no_grad(), estimator.observe(block) as observer:
        for batch, output, before in zip(batches, expected, given, strict=True):
            observed = observer(batch)
            assert observed is not None, "An observer that was asked for outputs returned None."
            expect_equal(observed, output, "The block's output under observation")
            expect_equal(batch.hidden, before, "The block's input after observation")
        sums = {
            name: CurvatureSum(
                column=each.column.clone(), tokens=each.tokens, row=None if each.row is None else each.row.clone()
            )
            for name, each in observer.sums().items()
        }
    expect(hooks_of(block.module) == hooks, "The estimator leaves hooks on the block.")
    for name, tensor in block.module.state_dict().items():
        expect_equal(tensor, weights[name], f"{name} of the block after observation")
    expect(all(each.grad is None for each in block.module.parameters()), "The estimator leaves gradients on the block.")
    return sums


def hooks_of(module: nn.Module) -> list[int]:
    """Return the ids of all hooks of a module and its children."""
    return [
        key
        for child in module.modules()
        for attribute in sorted(vars(child))
        if attribute.endswith("_hooks") and isinstance(hooks := getattr(child, attribute), OrderedDict)
        for key in hooks
    ]


def _check_sums(sums: Mapping[str, CurvatureSum], block: Block, tokens: int) -> None:
    expect(set(sums) == set(block.layers), f"sums() has {sorted(sums)}, the block has {sorted(block.layers)}.")
    for name, each in sums.items():
        out_features, in_features = block.layers[name].shape
        heads, dtype = each.column.shape[0], torch.promote_types(block.layers[name].weight().dtype, torch.float32)
        expect(
            each.column.shape == (heads, in_features, in_features) and each.column.dtype == dtype,
            f"{name}: column is {tuple(each.column.shape)} {each.column.dtype}; "
            f"[heads, {in_features}, {in_features}] in {dtype} is promised.",
        )
        expect(heads > 0 and out_features % heads == 0, f"{name}: {heads} heads do not divide {out_features} outputs.")
        expect(0 <= each.tokens <= tokens, f"{name}: {each.tokens} tokens counted of {tokens}.")
        _check_positive(each.column, f"{name}: column")
        if each.row is not None:
            rows = out_features // heads
            expect(each.row.shape == (heads, rows, rows), f"{name}: row is {tuple(each.row.shape)}.")
            _check_positive(each.row, f"{name}: row")


def _check_positive(matrix: Tensor, what: str) -> None:
    expect(bool(matrix.isfinite().all()), f"{what} has NaN or Inf.")
    expect_equal(matrix.transpose(1, 2).contiguous(), matrix.contiguous(), f"{what} mirrored (it has to be symmetric)")
    smallest = torch.linalg.eigvalsh(matrix.double()).amin()
    largest = matrix.abs().amax().double()
    expect(
        bool(smallest >= -1e-4 * largest), f"{what} is not positive semi-definite: eigenvalue {float(smallest):.3g}."
    )


def _added(parts: Sequence[CurvatureSum]) -> CurvatureSum:
    rows = [part.row for part in parts if part.row is not None]
    return CurvatureSum(
        column=torch.stack([part.column for part in parts]).sum(0),
        tokens=sum(part.tokens for part in parts),
        row=torch.stack(rows).sum(0) if rows else None,
    )


def _check_close(actual: Mapping[str, CurvatureSum], expected: Mapping[str, CurvatureSum], what: str) -> None:
    for name, each in expected.items():
        expect(
            actual[name].tokens == each.tokens,
            f"{name}: {actual[name].tokens} tokens with {what}, {each.tokens} without.",
        )
        error = (actual[name].column - each.column).abs().max() / each.column.abs().max().clamp(min=1e-30)
        expect(bool(error <= 1e-4), f"{name}: column differs by {float(error):.3g} (relative) with {what}.")


def _check_failure(estimator: HessianEstimator, block: Block, inputs: BlockInputs) -> None:
    """Hooks have to go when the pass fails too."""
    hooks = hooks_of(block.module)
    try:
        with torch.no_grad(), estimator.observe(block) as observer:
            observer(inputs)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    expect(hooks_of(block.module) == hooks, "The estimator leaves hooks on the block when the pass is interrupted.")
