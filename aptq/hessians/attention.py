"""The curvature of the attention block's output: APTQ's Hessian.

Source: APTQ (DAC 2024), equations 5-15, as the exact Gauss-Newton (Levenberg-Marquardt) Hessian of
``||F(W) - F(W')||^2`` with ``F`` the output of the attention block. The paper leaves open which cotangent its gradients
are taken with, and its formulas know no rotary embeddings, masks or grouped queries; here all of these are the affair
of the model's own module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from aptq.api import AptqError, Block, BlockInputs, CurvatureSum, Layer
from aptq.hessians.attention_part import AttentionPart, Measurement
from aptq.hessians.guidance import guidance_of, refuse_experts
from aptq.hessians.input_observer import InputLayers, InputObserver, pre_hooked
from aptq.hessians.weighted_inputs import WeightedLayers, WeightedObserver
from aptq.models.structure import find_attentions, find_mlps

_CHOICES = {
    "cotangent": ("random", "ones", "exact"),
    "scope": ("head", "layer"),
    "values": ("exact", "random"),
    "tokens": ("equal", "loss"),
}


@dataclass(frozen=True)
class Attention:
    """``H = 2 E[g^T g]`` for the layers of an attention block, ``g`` the gradient of ``<G, F>`` for random signs ``G``.

    Summed over the rows of a head (``scope: head``, a Hessian of its own for each) or of the whole layer (``layer``),
    and divided by their number. Where the structure allows it, less is left to chance:

    - An output that is only used at its own token (queries) has independent gradients at different tokens, so that
      ``H = 2 sum_t w_t x_t x_t^T`` with ``w_t = E||g_t||^2``: a token-weighted input Hessian.
    - ``F`` is linear in the values. With ``A_h`` the attention of head ``h`` and ``W_O,h`` its part of the output
      layer, ``H = 2 sum_{h,h'} tr(W_O,h^T W_O,h') (A_h X)^T (A_h' X)`` over the heads that share a value head
      (``values: exact``; ``random`` leaves it to the cotangents). ``A_h X`` is what the module makes of ``X`` in the
      place of its values.
    - Keys have neither. ``probes`` cotangents are drawn for each sample.

    The output layer, and all layers outside attention, have the Hessian of their inputs (``hessian=input``). With
    ``mlp`` the same is done at the output of the feed-forward modules, for all of their layers but the last: what these
    put out is used at its own token, so that it is a matter of token weights once more.

    ``tokens: loss`` weighs the error of each token's output ``F_t`` by ``w_t``, the mean square of the gradient that
    the model's loss has there (see ``aptq.hessians.loss``): the objective is ``sum_t w_t ||dF_t||^2 / 2``, in nats, at
    all layers, the output layers included. It goes with ``mlp``.

    ``cotangent: ones`` takes one gradient with ``G = 1`` instead: the literal reading of the paper, which does not
    estimate the Hessian. ``exact`` goes through every entry of ``G``, which only a tiny model can afford.

    Source: derived from APTQ (DAC 2024), equations 7 and 9-15.
    """

    probes: int = 1
    scope: str = "head"
    values: str = "exact"
    cotangent: str = "random"
    mlp: bool = False
    tokens: str = "equal"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise AptqError(f"hessian.probes={self.probes} is not allowed; use 1 or more.")
        for key, allowed in _CHOICES.items():
            if getattr(self, key) not in allowed:
                raise AptqError(f"hessian.{key}={getattr(self, key)!r} is not known; use one of {', '.join(allowed)}.")
        if self.labels is not None and not self.mlp:
            raise AptqError("hessian.tokens=loss needs hessian.mlp=true, so that all layers are in the loss's unit.")

    @property
    def labels(self) -> str | None:
        """The next token of the text, where tokens are weighed by the loss; see ``aptq.api.GuidedEstimator``."""
        return None if self.tokens == "equal" else "data"

    def guides(self, block: Block) -> Mapping[str, int]:
        """Ask for the gradients at the outputs of attention and feed-forward modules, or of the head.

        Raises:
            AptqError: there is no attention, or the block is a mixture of experts.
        """
        refuse_experts(block)
        return dict.fromkeys(self._modules(block) or block.layers, 1)

    @contextmanager
    def observe(self, block: Block, *, need_outputs: bool = True) -> Iterator[AttentionObserver]:
        """Hook the block's attention modules and the inputs of all other layers.

        Raises:
            AptqError: the block has no attention module, or one without linear layers; or the loss's gradients at its
                modules are wanted and not known. A head, which is a step of the walk without being a block, has the
                Hessian of its inputs.
        """
        parts = self._parts(block)
        observer = AttentionObserver(block, need_outputs, parts, self._weighted(block, parts))
        with observer.hooked():
            yield observer

    @contextmanager
    def watch(self, block: Block) -> Iterator[AttentionLayers]:
        """Hook the block's attention modules for what they are called with; raise as ``observe`` does."""
        parts = self._parts(block)
        watched = AttentionLayers(parts, self._weighted(block, parts))
        with ExitStack() as stack:
            for part in parts:
                handle = part.module.register_forward_pre_hook(watched.hook(part), with_kwargs=True)
                stack.callback(handle.remove)
            yield watched

    def _modules(self, block: Block) -> dict[str, nn.Module]:
        """Return the modules at whose outputs errors are measured, by full name; none for a head."""
        modules = find_attentions(block.module)
        head = any(layer.module is block.module for layer in block.layers.values())
        if not modules and not head:
            raise AptqError(
                f"{block.name} has no attention module (one whose class is called so), and hessian=attention measures "
                "at its output; use hessian=input."
            )
        if self.mlp:
            modules |= find_mlps(block.module)
        return {f"{block.name}.{name}": module for name, module in modules.items()}

    def _parts(self, block: Block) -> list[AttentionPart]:
        modules = self._modules(block)
        how = Measurement(self.probes, self.scope == "head", self.values == "exact", self.cotangent, self.seed)
        weights = {} if self.labels is None else guidance_of(block, modules)
        return [
            AttentionPart(name, module, block, how, weights[name][..., 0] if weights else None)
            for name, module in modules.items()
        ]

    def _weighted(self, block: Block, parts: Sequence[AttentionPart]) -> dict[str, Tensor]:
        """Return the token weights of output layers, and of a head."""
        if self.labels is None:
            return {}
        last = {part.last: block.guidance[part.name] for part in parts if part.last in block.layers}
        return last if parts else dict(guidance_of(block, block.layers))


class AttentionLayers:
    """Measures an attention module when all batches wait at the first of its layers, none of them rounded yet."""

    def __init__(self, parts: Sequence[AttentionPart], weighted: Mapping[str, Tensor]) -> None:
        self._calls: dict[AttentionPart, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {part: [] for part in parts}
        self._of = {name: part for part in parts for name in part.layers}
        self._sums: dict[str, CurvatureSum] = {}
        self._others = InputLayers()
        self._weighted = WeightedLayers(weighted)

    def hook(self, part: AttentionPart) -> Callable[..., None]:
        """Return the forward pre-hook of an attention module."""

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            if part in self._calls:  # else the part itself runs the module, to measure it
                self._calls[part].append((args, kwargs))

        return keep

    def curvature_sum(self, layer: Layer, inputs: Sequence[Tensor], samples: Sequence[Sequence[int]]) -> CurvatureSum:
        """See ``aptq.api.LayerObserver``."""
        if layer.name in self._weighted.weights:
            return self._weighted.curvature_sum(layer, inputs, samples)
        part = self._of.get(layer.name)
        if part is None:
            return self._others.curvature_sum(layer, inputs, samples)
        if layer.name not in self._sums:
            for (args, kwargs), numbers in zip(self._calls.pop(part), samples, strict=True):
                part.add(args, kwargs, numbers)
            self._sums |= part.sums()
        return self._sums.pop(layer.name)


class AttentionObserver:
    """Measures each attention module when the block comes to it, on the arguments that it is called with."""

    def __init__(
        self, block: Block, need_outputs: bool, parts: Sequence[AttentionPart], weighted: Mapping[str, Tensor]
    ) -> None:
        self._block, self._parts = block, parts
        measured = {name for part in self._parts for name in part.layers}
        others = {name: layer for name, layer in block.layers.items() if name not in measured | weighted.keys()}
        self._inputs = InputObserver(replace(block, layers=others), need_outputs)
        self._weighted = WeightedObserver(
            replace(block, layers={each: block.layers[each] for each in weighted}), weighted
        )
        self._busy = False  # a module is being run on the side: what its layers see then is not the block's

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch the block while the context lasts."""
        with ExitStack() as stack:
            for part in self._parts:
                handle = part.module.register_forward_pre_hook(self._measure(part), with_kwargs=True)
                stack.callback(handle.remove)
            for observer in (self._inputs, self._weighted):
                stack.enter_context(pre_hooked(observer.block.layers, self._unless_busy(observer.hook)))
            yield

    def _unless_busy(self, hook_of: Callable[[str], Callable[..., None]]) -> Callable[[str], Callable[..., None]]:
        def hook(name: str) -> Callable[..., None]:
            inner = hook_of(name)
            return lambda *arguments: None if self._busy else inner(*arguments)

        return hook

    def _measure(self, part: AttentionPart) -> Callable[..., None]:
        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            if not self._busy:
                self._busy = True
                try:
                    part.add(args, kwargs, self._weighted.samples)
                finally:
                    self._busy = False

        return measure

    def __call__(self, inputs: BlockInputs) -> Tensor | None:
        """Run the block with the hooks on."""
        self._weighted.samples = inputs.samples or range(len(inputs.hidden))
        return self._inputs(inputs)

    def sums(self) -> Mapping[str, CurvatureSum]:
        """Return the sums of all layers."""
        found = dict(self._inputs.sums()) | dict(self._weighted.sums())
        for part in self._parts:
            found |= part.sums()
        return {name: found[name] for name in self._block.layers}
