"""What rounded layers do to the model's predictions: measured, for many plans in one walk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from aptq.api import Block, Option
from aptq.calibration.coding import Coding
from aptq.calibration.roundings import Roundings
from aptq.calibration.walk import Step, Walk

_AT_ONCE = 64
"""Plans that travel side by side, a set of hidden states each; more of them walk one batch after the other."""

_ORIGINAL = -1
"""Stands among the numbers of plans for the model as it was."""

Plan = Mapping[str, Option]
_Chosen = tuple[Option | None, ...]  # of a block's layers; None: as it was


def measure_divergence(
    few: Walk,
    roundings: Roundings,
    coding: Coding,
    plans: Sequence[Plan],
    *,
    last_tokens: int | None = None,
    on_block: Callable[[float, str], None] = lambda share, name: None,
) -> list[float]:
    """Return the Kullback-Leibler divergence of each plan's predictions from the original model's, in nats per token.

    The plans travel through the model side by side, block by block; those that agree so far travel as one, so a plan
    that begins deep in the model costs no more than the rest of the way.

    Args:
        few: a walk over the samples to measure on, one in a batch (``Walk.beginning``).
        roundings: of every layer at every option that occurs.
        plans: the option of each layer that is rounded; the others stay as they were.
        last_tokens: how many predictions of each sample are compared, from its end; all by default.
        on_block: called before each block with the share of the work that is done, and the block's name.

    Returns:
        one figure a plan; infinite where predictions are not finite.
    """
    found: list[float] = []
    for start in range(0, len(plans), _AT_ONCE):
        share = len(plans[start : start + _AT_ONCE]) / len(plans)
        begun = start / len(plans)

        def tell(at: float, name: str, share: float = share, begun: float = begun) -> None:
            on_block(begun + at * share, name)

        found += _side_by_side(few, roundings, coding, plans[start : start + _AT_ONCE], last_tokens, tell)
    return found


@dataclass(eq=False)
class _Branch:
    """Plans that have agreed so far, and what the blocks made of the samples under them."""

    plans: list[int]
    states: list[Tensor]


def _side_by_side(
    few: Walk,
    roundings: Roundings,
    coding: Coding,
    plans: Sequence[Plan],
    last_tokens: int | None,
    on_block: Callable[[float, str], None],
) -> list[float]:
    branches = [_Branch([*range(len(plans)), _ORIGINAL], [])]
    head: Step | None = None
    for step in few.steps():
        on_block(step.block.index / few.source.num_steps, step.block.name)
        if step.last:
            head = step
            break
        if step.block.index == 0:
            branches[0].states = [batch.hidden for batch in step.inputs]
        with _Weights(step.block, roundings, coding, plans) as weights:
            moved = []
            for branch in weights.along(_split(branches, step.block, plans)):
                moved.append(_Branch(branch.plans, _run(few.step(step.block, branch.states))))
        branches = moved
        step.outputs = next(branch.states for branch in branches if _ORIGINAL in branch.plans)
    totals = torch.zeros(len(plans), dtype=torch.float64, device=few.fabric.device)
    batches = range(len(branches[0].states))
    if head is None:
        for batch in batches:
            _compare(few, batch, branches, totals, last_tokens)
    else:
        with _Weights(head.block, roundings, coding, plans) as weights:
            for batch in batches:
                _compare(few, batch, weights.along(_split(branches, head.block, plans)), totals, last_tokens)
    if few.fabric.world_size > 1:
        dist.all_reduce(totals)
    samples, tokens = few.samples.shape
    compared = samples * (tokens if last_tokens is None else min(last_tokens, tokens))
    return [value if math.isfinite(value) else math.inf for value in (totals / compared).tolist()]


def _split(branches: Sequence[_Branch], block: Block, plans: Sequence[Plan]) -> Iterator[tuple[_Branch, _Chosen]]:
    """Part branches by what their plans choose for a block; equal ones come in a row, the original first."""

    def chosen(plan: int) -> _Chosen:
        return tuple(None if plan == _ORIGINAL else plans[plan].get(name) for name in block.layers)

    def order(choice: _Chosen) -> tuple[Option, ...]:
        return tuple(option or Option(0, 0) for option in choice)

    parts: list[tuple[_Branch, _Chosen]] = []
    for branch in branches:
        choices: dict[_Chosen, list[int]] = {}
        for plan in branch.plans:
            choices.setdefault(chosen(plan), []).append(plan)
        parts += [(_Branch(members, branch.states), choice) for choice, members in choices.items()]
    yield from sorted(parts, key=lambda part: (order(part[1]), _ORIGINAL not in part[0].plans))


class _Weights:
    """A block whose layers take one choice after the other, and are as they were in the end."""

    def __init__(self, block: Block, roundings: Roundings, coding: Coding, plans: Sequence[Plan]) -> None:
        self._block, self._coding = block, coding
        used = any(name in plan for plan in plans for name in block.layers)
        self._packed = roundings.load(block) if used else {}
        self._now: list[Option | None] = [None] * len(block.layers)
        self._originals: dict[str, Tensor] = {}

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *error: object) -> None:
        self.follow([None] * len(self._now))

    def follow(self, chosen: Sequence[Option | None]) -> None:
        """Give each layer the weight of its option; None is the original's."""
        for at, (name, layer) in enumerate(self._block.layers.items()):
            option = chosen[at]
            if option == self._now[at]:
                continue
            if name not in self._originals:
                self._originals[name] = layer.weight().clone()
            if option is None:
                layer.set_weight(self._originals[name])
            else:
                layer.set_weight(self._coding.restored(self._packed[name][option], option, layer.shape))
            self._now[at] = option

    def along(self, parts: Iterable[tuple[_Branch, _Chosen]]) -> Iterator[_Branch]:
        """Yield each branch with its choice in place."""
        for branch, chosen in parts:
            self.follow(chosen)
            yield branch


def _run(step: Step) -> list[Tensor]:
    step.run()
    return step.outputs


def _compare(few: Walk, batch: int, branches: Iterable[_Branch], totals: Tensor, last_tokens: int | None) -> None:
    """Add up what each branch's predictions of a batch differ by from the original's, which come first."""
    reference: Tensor | None = None
    for branch in branches:
        predicted = _predictions(few, batch, branch.states[batch], last_tokens)
        if reference is None:
            if _ORIGINAL not in branch.plans:
                raise RuntimeError("the original's predictions are to come first")
            reference = predicted
            continue
        totals[branch.plans] += torch.sum(reference.exp() * (reference - predicted), dtype=torch.float64)


def _predictions(few: Walk, batch: int, hidden: Tensor, last_tokens: int | None) -> Tensor:
    """Return log-probabilities ``[tokens, vocabulary]`` of a batch of one sample."""
    with torch.no_grad():
        (_, _, logits) = next(few.finish(batch, hidden, last_tokens))
        return logits[0].float().log_softmax(-1)
