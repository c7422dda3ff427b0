"""What plans do to the model's predictions: measured, for many plans in one walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from aptq.api import Callback, HessianEstimator, Layer, Option
from aptq.calibration.measure import Rounding, measure_layers, share_packed
from aptq.calibration.rounding import set_from_packed
from aptq.calibration.walk import Step, Walk

STAGE = "audit"

Packed = Mapping[Option, Mapping[str, Tensor]]


def measure_divergence(
    walk: Walk,
    estimator: HessianEstimator,
    rounding: Rounding,
    plans: Sequence[Mapping[str, Option]],
    *,
    num_samples: int,
    callbacks: Callback,
) -> list[float]:
    """Return the Kullback-Leibler divergence of each plan's predictions from the original model's, in nats per token.

    Every layer is rounded once at every option that some plan gives it, on what the full-precision model feeds it, as
    in pass 1; the plans then travel through the model side by side, ``num_samples`` of the calibration samples each.
    """
    few = walk.beginning(num_samples)
    original = few.first_inputs()
    states = [list(original) for _ in plans]
    head: Step | None = None
    packed: Mapping[str, Packed] = {}
    for step in walk.steps():
        callbacks.on_advance(stage=STAGE, done=step.block.index, detail=step.block.name)
        packed = _round(step, estimator, rounding, plans, walk)
        if step.last:
            head = step
            break
        original = _run(few.step(step.block, original))
        for number, plan in enumerate(plans):
            _follow(plan, step.block.layers, packed, rounding)
            states[number] = _run(few.step(step.block, states[number]))
        callbacks.on_block_end(stage=STAGE, index=step.block.index, metrics={})
    totals = torch.zeros(len(plans), dtype=torch.float64, device=walk.fabric.device)
    for batch, hidden in enumerate(original):
        reference = _predictions(few, batch, hidden)
        for number, plan in enumerate(plans):
            if head is not None:
                _follow(plan, head.block.layers, packed, rounding)
            predicted = _predictions(few, batch, states[number][batch])
            totals[number] += torch.sum(reference.exp() * (reference - predicted), dtype=torch.float64)
        if head is not None:
            walk.source.load_head()  # as it was
    if walk.fabric.world_size > 1:
        dist.all_reduce(totals)
    return (totals / few.samples.numel()).tolist()


def _round(
    step: Step, estimator: HessianEstimator, rounding: Rounding, plans: Sequence[Mapping[str, Option]], walk: Walk
) -> Mapping[str, Packed]:
    """Round a block's layers at all options that occur in it; return the packed tensors on every rank."""
    wanted = [name for name in step.block.layers if name in plans[0]]
    options = sorted({plan[name] for plan in plans for name in wanted})
    _, observed, mine = measure_layers(step, estimator, walk, wanted, rounding, options, need_outputs=True)
    return share_packed(step.block, wanted, observed, mine, rounding.format, options, walk)


def _follow(
    plan: Mapping[str, Option], layers: Mapping[str, Layer], packed: Mapping[str, Packed], rounding: Rounding
) -> None:
    """Give each layer the weight that a plan chose."""
    for name, options in packed.items():
        set_from_packed(layers[name], options[plan[name]], rounding.format, plan[name])


def _run(step: Step) -> list[Tensor]:
    step.run()
    return step.outputs


def _predictions(walk: Walk, batch: int, hidden: Tensor) -> Tensor:
    """Return log-probabilities ``[tokens, vocabulary]`` of a batch of one sample."""
    with torch.no_grad():
        (_, _, logits) = next(walk.finish(batch, hidden))
        return logits[0].float().log_softmax(-1)
