"""Pass 2: rounding every layer, on the inputs that the quantized blocks before it give unless told otherwise."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aptq.api import (
    ActivationQuantizer,
    Block,
    Callback,
    Curvature,
    DriftEstimator,
    Format,
    HessianEstimator,
    Layer,
    LayerReport,
    Option,
    Quantizer,
    SequentialEstimator,
    Transform,
)
from aptq.calibration.activations import quantized_inputs
from aptq.calibration.coding import Coding
from aptq.calibration.observe import Observed, observe, observe_head, observe_in_turn
from aptq.calibration.rounding import Preparations, needs_drift, round_layer, share_layer
from aptq.calibration.walk import Step, Walk
from aptq.models.structure import has_experts

STAGE = "quantize"
PREFIXES = ("quantized", "full_precision")
_log = logging.getLogger(__name__)


class BlockStore(Protocol):
    """Where finished blocks are kept, so that an interrupted run goes on after the last of them."""

    def block_done(self, index: int) -> bool:
        """Whether the block is whole on disk."""

    def save_block(self, index: int, tensors: dict[str, Tensor], reports: list[LayerReport]) -> None:
        """Keep a block's packed tensors, named ``layer.tensor``."""

    def load_block(self, index: int) -> tuple[dict[str, Tensor], list[LayerReport]]:
        """Return what ``save_block`` was given."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to quantize: the components of pass 2 and the plan they follow.

    ``prefix`` says what stands before a block while it is calibrated: the blocks as they were rounded, or as they were
    ("full_precision", a stale prefix). In the second case its own layers are calibrated before any is rounded, too.
    ``activation`` quantizes what the layers are called with, wherever they are calibrated behind rounded blocks.
    ``transform`` is the basis that weights are rounded in, and inputs quantized.
    """

    estimator: HessianEstimator
    quantizer: Quantizer
    format: Format
    plan: Mapping[str, Option]
    costs: Mapping[str, float]  # predicted by the metric for the plan; empty when none ran
    true_sequential: bool = True  # round each layer before the next one of its block is calibrated, where that can be
    prefix: str = "quantized"  # one of PREFIXES
    activation: ActivationQuantizer | None = None
    transform: Transform | None = None

    @property
    def coding(self) -> Coding:
        """How layers are stored."""
        return Coding(self.format, self.transform)


def quantize(walk: Walk, recipe: Recipe, store: BlockStore, callbacks: Callback) -> list[LayerReport]:
    """Quantize every layer of the plan, block by block; return one report a layer.

    Blocks that the store already holds are dequantized and run (with ``prefix="full_precision"``: run as they were),
    which gives the next block bit for bit the inputs it would have had without the interruption.
    """
    reports: list[LayerReport] = []
    for step in walk.steps(full_precision=needs_drift(recipe.quantizer)):
        index = step.block.index
        callbacks.on_advance(stage=STAGE, done=index, detail=step.block.name)
        with _inputs(step.block, recipe) if recipe.prefix == "quantized" else nullcontext():
            if walk.fabric.broadcast(store.block_done(index)):
                tensors, rows = store.load_block(index)
                if step.full_precision is not None:
                    step.full_precision.run()  # on the original weights
                if recipe.prefix == "quantized":
                    _restore(step.block, recipe, tensors, walk.fabric.device)
            else:
                rows = _quantize_block(step, recipe, walk, store, callbacks)
            if not step.outputs:
                step.run()
        reports += rows
        mean = sum(row.relative_error for row in rows) / max(len(rows), 1)
        callbacks.on_block_end(stage=STAGE, index=index, metrics={"relative_error": mean})
    return reports


def stored_logits(walk: Walk, recipe: Recipe, store: BlockStore) -> Tensor:
    """Send a walk through all blocks as the store holds them; return ``Walk.logits``.

    Layers do what they will do in the written model: stored weights on inputs in their basis. Codes of quantized inputs
    are the same then; behind another order of sums some would fall to the other side of a midpoint.
    """
    with ExitStack() as head:
        for step in walk.steps():
            tensors, _ = store.load_block(step.block.index)
            _restore(step.block, recipe, tensors, walk.fabric.device, as_stored=True)
            if step.last:
                head.enter_context(_inputs(step.block, recipe, as_stored=True))  # it runs for the logits
            else:
                with _inputs(step.block, recipe, as_stored=True):
                    step.run()
        return walk.logits()


def _inputs(block: Block, recipe: Recipe, *, as_stored: bool = False) -> AbstractContextManager[None]:
    """Have the planned layers of a block called with quantized inputs, if they are to be."""
    layers = (layer for _, _, layer in _planned(block, recipe))
    return quantized_inputs(layers, recipe.activation, recipe.transform, as_stored=as_stored)


def _restore(
    block: Block, recipe: Recipe, tensors: Mapping[str, Tensor], device: torch.device, *, as_stored: bool = False
) -> None:
    """Put the dequantized weights of stored packed tensors into a block, in the model's own basis or as stored."""
    weight = recipe.coding.stored if as_stored else recipe.coding.restored
    for name, option, layer in _planned(block, recipe):
        packed = {key: tensors[f"{name}.{key}"].to(device) for key in recipe.format.packed_layout(option, layer.shape)}
        layer.set_weight(weight(packed, option, layer.shape))


def _planned(block: Block, recipe: Recipe) -> list[tuple[str, Option, Layer]]:
    return [(name, recipe.plan[name], layer) for name, layer in block.layers.items() if name in recipe.plan]


def _quantize_block(
    step: Step, recipe: Recipe, walk: Walk, store: BlockStore, callbacks: Callback
) -> list[LayerReport]:
    """Observe a block, round its layers on their owner ranks, share the codes, store them."""
    block = step.block
    planned = {name: option for name, option, _ in _planned(block, recipe)}
    stored: dict[str, Tensor] = {}
    reports: dict[str, LayerReport] = {}
    prepared = Preparations(recipe.quantizer)
    for observed in _observed(step, recipe, walk, list(planned)):
        prepared.keep(observed.curvatures.values())
        rows: dict[str, LayerReport] = {}
        packed: dict[str, dict[str, Tensor]] = {}
        for name, curvature in observed.curvatures.items():
            if name in planned:
                done = block.index + (len(reports) + len(rows) + 1) / (len(planned) + 1)
                callbacks.on_advance(stage=STAGE, done=done, detail=f"{name} at {planned[name].bits} bits")
                layer = block.layers[name]
                rows[name], packed[name] = _quantize_layer(layer, curvature, recipe, planned[name], prepared)
        for name, owner in observed.owners.items():
            if name in planned:
                layer = block.layers[name]
                tensors = share_layer(layer, packed.pop(name, None), owner, recipe.coding, planned[name], walk.fabric)
                stored.update((f"{name}.{key}", tensor.cpu()) for key, tensor in tensors.items())
                reports[name] = walk.fabric.broadcast(rows.get(name), src=owner)  # type: ignore[assignment]
                callbacks.on_layer_end(stage=STAGE, report=reports[name])
    in_order = [reports[name] for name in planned]
    if walk.fabric.global_rank == 0:
        store.save_block(block.index, stored, in_order)
    return in_order


def _observed(step: Step, recipe: Recipe, walk: Walk, layers: Collection[str]) -> Iterable[Observed]:
    """Give the layers' curvatures: one layer after the other as they are rounded, or all at once."""
    if recipe.prefix == "full_precision":  # all before any is rounded, and so are the block's outputs
        return [observe(step, recipe.estimator, walk, recipe.transform, need_outputs=not step.last)]
    if step.full_precision is not None and step.last and isinstance(recipe.estimator, DriftEstimator):
        return observe_head(step, recipe.estimator, walk, recipe.transform)
    one_path = not step.last and not has_experts(step.block.module)
    if recipe.true_sequential and one_path and isinstance(recipe.estimator, SequentialEstimator):
        return observe_in_turn(step, recipe.estimator, walk, recipe.transform, layers)
    return [observe(step, recipe.estimator, walk, recipe.transform, need_outputs=False)]


def _quantize_layer(
    layer: Layer, curvature: Curvature, recipe: Recipe, option: Option, prepared: Preparations
) -> tuple[LayerReport, dict[str, Tensor]]:
    """Round one layer and measure it; layers that share a curvature share its factors."""
    started = time.perf_counter()
    factors, new = prepared.of(curvature)
    for event in factors.events if new else ():
        _log.warning("%s: %s", layer.name, event)
    outcome = round_layer(recipe.coding.weight(layer), curvature, recipe.quantizer, factors, recipe.format, option)
    out_features, in_features = layer.shape
    packed = recipe.format.pack(outcome.weight, option)
    report = LayerReport(
        name=layer.name,
        out_features=out_features,
        in_features=in_features,
        bits=option.bits,
        format=option.format,
        group_size=option.group_size,
        storage_bits=storage_bits(recipe.format, option, layer.shape) / (out_features * in_features),
        tokens=curvature.tokens,
        trace=curvature.trace(out_features) / (out_features * in_features),
        predicted_cost=recipe.costs.get(layer.name),
        error_nearest=outcome.error_nearest,
        error=outcome.error,
        relative_error=outcome.relative_error,
        damping=factors.damping,
        seconds=time.perf_counter() - started,
        events="; ".join(factors.events),
    )
    return report, packed


def storage_bits(format: Format, option: Option, shape: tuple[int, int]) -> int:
    """Return all bits that a layer takes on disk: codes, scales, zeros, padding."""
    layout = format.packed_layout(option, shape).values()
    return sum(8 * dtype.itemsize * torch.Size(size).numel() for size, dtype in layout)
