"""One attention (or feed-forward) module under observation: what its layers are to it, and their Hessians."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aptq.api import AptqError, Block, CurvatureSum, Layer
from aptq.hessians.gram import add_gram, empty_sum, mirror
from aptq.models.structure import find_layers

_log = logging.getLogger(__name__)
_TOLERANCE = 1e-3  # of the largest entry, when the closed form of the values is held against the module
_TOLERANCE_HALF = 5e-2  # the same in 16 bits

_Call = tuple[tuple[Any, ...], dict[str, Any]]  # what the module is called with


@dataclass(frozen=True)
class Measurement:
    """The options of ``aptq.hessians.attention.Attention``."""

    probes: int
    by_head: bool
    exact_values: bool
    cotangent: str
    seed: int


@dataclass(frozen=True)
class _Roles:
    """By layer, the heads whose Hessian is found in each of three ways."""

    local: Mapping[str, Sequence[int]]  # used at their own token alone: queries
    values: Mapping[str, Sequence[int]]  # in closed form
    others: Mapping[str, Sequence[int]]  # from whole gradients


@dataclass(eq=False)
class _Seen:
    """One layer in one run of the module."""

    input: Tensor  # [samples, tokens, in]
    output: Tensor  # [samples, tokens, out], part of autograd's graph


class AttentionPart:
    """One module; ``layers`` are those that are measured here: all but the last, the output layer."""

    def __init__(self, name: str, module: nn.Module, block: Block, how: Measurement) -> None:
        self.name, self.module = name, module
        self._how, self._block_index = how, block.index
        all_layers = find_layers(module, name)
        if not all_layers:
            raise AptqError(f"{name} has no linear layers, and hessian=attention measures them; use hessian=input.")
        *before, last = all_layers
        self._output = all_layers[last]
        self.layers = {each: block.layers[each] for each in before if each in block.layers}
        self._head_dim: int = getattr(module, "head_dim", 0)
        self._roles: _Roles | None = None
        self._sums = {
            each: empty_sum(layer, self._heads(layer) if how.by_head else 1) for each, layer in self.layers.items()
        }

    def _heads(self, layer: Layer) -> int:
        """Return how many blocks of rows are heads; 1 where the rows are no whole number of them."""
        rows = layer.shape[0]
        return rows // self._head_dim if self._head_dim and rows % self._head_dim == 0 else 1

    def _split(self, name: str, tensor: Tensor) -> Tensor:
        """View ``[samples, tokens, out]`` as ``[samples, tokens, heads, rows]``."""
        split: Tensor = tensor.unflatten(-1, (self._heads(self.layers[name]), -1))
        return split

    def sums(self) -> dict[str, CurvatureSum]:
        """Return the sums of the layers; call once, after the last ``add``."""
        for total in self._sums.values():
            mirror(total.column)
        return self._sums

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], samples: Sequence[int]) -> None:
        """Measure one call of the module; ``samples`` are the numbers of its samples, 0, 1, ... where not given."""
        if not self.layers:
            return
        with torch.enable_grad():
            output, seen = self._run((args, kwargs))
            if self._roles is None:
                self._roles = self._find_roles(output, seen, (args, kwargs))
            weights = self._add_gradients(output, seen, samples, self._roles)
        del output
        for name, heads in self._roles.local.items():
            self._add_weighted(name, heads, seen[name].input, weights[name])
        for name, heads in self._roles.values.items():
            self._add_values(name, heads, seen, (args, kwargs))
        for name, each in seen.items():
            self._sums[name].tokens += each.input.shape[0] * each.input.shape[1]

    def _run(self, call: _Call) -> tuple[Tensor, dict[str, _Seen]]:
        """Run the module so that its output can be differentiated by the outputs of its layers."""
        seen: dict[str, _Seen] = {}

        def keep(name: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                del module
                output = output if output.requires_grad else output.detach().requires_grad_()
                seen[name] = _Seen(inputs[0].detach(), output)
                return output

            return hook

        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.callback(layer.module.register_forward_hook(keep(name)).remove)
            args, kwargs = call
            output = self.module(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output, seen

    # -------------------------------------------------------------------------------------------- who is what

    def _find_roles(self, output: Tensor, seen: Mapping[str, _Seen], call: _Call) -> _Roles:
        every = {name: range(self._heads(self.layers[name])) for name in seen}
        if self._how.cotangent == "ones":  # the paper's formula, for all alike
            return _Roles(local={}, values={}, others=every)
        local = self._find_local(output, seen)
        values = self._find_values(local, seen, call) if self._how.exact_values else {}
        others = {
            name: [h for h in every[name] if h not in local[name] and h not in values.get(name, ())] for name in seen
        }
        return _Roles(local=local, values=values, others=others)

    def _find_local(self, output: Tensor, seen: Mapping[str, _Seen]) -> dict[str, list[int]]:
        """Tell which heads are used at their own token alone, by a look at gradients.

        The later tokens' outputs depend on earlier keys and values, and on no earlier query.
        """
        tokens = output.shape[1]
        late = torch.zeros_like(output)
        late[:, tokens // 2 :] = 1.0
        found = torch.autograd.grad(output, [each.output for each in seen.values()], late, retain_graph=True)
        local = {}
        for name, gradient in zip(seen, found, strict=True):
            early = self._split(name, gradient)[:, : tokens // 2].abs().sum((0, 1, 3))
            local[name] = [head for head, value in enumerate(early.tolist()) if value == 0.0 and tokens > 1]
        return local

    def _find_values(
        self, local: Mapping[str, list[int]], seen: Mapping[str, _Seen], call: _Call
    ) -> dict[str, list[int]]:
        """Find the heads whose closed form gives the output layer's input; empty where none does."""
        for name in reversed(list(seen)):  # values come after keys, more often than not
            rest = [head for head in range(self._heads(self.layers[name])) if head not in local[name]]
            half = len(rest) // 2
            for heads in [rest[half:], rest[:half]] if local[name] else [rest]:  # one matrix for queries, keys, values
                if heads and self._are_values(name, heads, seen, call):
                    return {name: heads}
        if self._head_dim:
            _log.info("%s: its values have no closed form that is known; random cotangents measure them.", self.name)
        return {}

    def _are_values(self, name: str, heads: Sequence[int], seen: Mapping[str, _Seen], call: _Call) -> bool:
        """Whether the output layer is fed with ``A_h (X W_V^T + b)`` for these heads."""
        width = self._output.shape[1]
        if not self._head_dim or width % (self._head_dim * len(heads)):
            return False
        own = self._split(name, seen[name].output.detach())[:, :, heads]
        actual = self._mix(name, heads, own, seen, call)
        attended = self._attend(name, heads, seen, call)
        weight = self._by_output_head(name, heads, self.layers[name].weight(), width)
        expected = torch.einsum("bnhi,hmi->bnhm", attended, weight.to(attended.dtype))
        bias = getattr(self.layers[name].module, "bias", None)
        if bias is not None:
            expected += self._by_output_head(name, heads, bias, width).to(expected.dtype)
        tolerance = _TOLERANCE if actual.dtype.itemsize >= 4 else _TOLERANCE_HALF
        return bool((expected - actual).abs().max() <= tolerance * actual.abs().max())

    def _by_output_head(self, name: str, heads: Sequence[int], rows: Tensor, width: int) -> Tensor:
        """Return the rows of value heads, each repeated for the query heads that share it: ``[heads, m, ...]``."""
        by_head: Tensor = rows.unflatten(0, (self._heads(self.layers[name]), -1))[list(heads)]
        return by_head.repeat_interleave(width // (self._head_dim * len(heads)), dim=0)

    # ----------------------------------------------------------------------------------------------- gradients

    def _add_gradients(
        self, output: Tensor, seen: Mapping[str, _Seen], samples: Sequence[int], roles: _Roles
    ) -> dict[str, Tensor]:
        """Add ``g^T g`` where there is no better; return ``E||g_t||^2`` of every head ``[samples, tokens, heads]``."""
        weights: dict[str, Tensor] = {}
        cotangents = list(self._cotangents(output, samples))
        for number, (share, cotangent) in enumerate(cotangents):
            more = number + 1 < len(cotangents)
            found = torch.autograd.grad(output, [each.output for each in seen.values()], cotangent, retain_graph=more)
            for (name, each), gradient in zip(seen.items(), found, strict=True):
                by_head = self._split(name, gradient).to(self._sums[name].column.dtype)
                squares = by_head.square().sum(-1) * share
                weights[name] = weights[name] + squares if name in weights else squares
                for head in roles.others[name]:
                    whole = by_head[:, :, head].transpose(1, 2) @ each.input.to(by_head.dtype)  # [samples, rows, in]
                    self._add(name, head, whole.flatten(0, 1), share)
        return weights

    def _cotangents(self, output: Tensor, samples: Sequence[int]) -> Iterator[tuple[float, Tensor]]:
        """Give cotangents and what each counts, such that ``E[G G^T]`` is the identity (but for ``ones``)."""
        if self._how.cotangent == "ones":
            yield 1.0, torch.ones_like(output)
        elif self._how.cotangent == "exact":
            for entry in range(output[0].numel()):
                unit = torch.zeros_like(output)
                unit.flatten(1)[:, entry] = 1.0
                yield 1.0, unit
        else:
            for probe in range(self._how.probes):
                numbers = samples or range(len(output))
                keys = [(self._how.seed, self._block_index, sample, probe) for sample in numbers]
                signs = torch.stack([random_signs(output.shape[1:], key) for key in keys])
                yield 1.0 / self._how.probes, signs.to(output)

    def _add_weighted(self, name: str, heads: Sequence[int], x: Tensor, weights: Tensor) -> None:
        """Add ``w_t x_t x_t^T`` with ``x [samples, tokens, in]`` and ``weights [samples, tokens, heads]``."""
        mine = weights[:, :, list(heads)].flatten(0, 1)
        if not self._how.by_head:
            heads, mine = heads[:1], mine.sum(1, keepdim=True)
        rows = x.flatten(0, 1).to(mine.dtype)
        for number, head in enumerate(heads):
            self._add(name, head, rows * mine[:, number, None].sqrt())

    def _add(self, name: str, head: int, rows: Tensor, share: float = 1.0) -> None:
        """Add ``2 r r^T`` for each of ``rows [*, in]`` to a head's Hessian, for an average row of its weight."""
        layer, by_head = self.layers[name], self._how.by_head
        averaged = layer.shape[0] // self._heads(layer) if by_head else layer.shape[0]
        add_gram(self._sums[name].column[head if by_head else 0], rows, 2.0 * share / averaged)

    # -------------------------------------------------------------------------------------------------- values

    def _add_values(self, name: str, heads: Sequence[int], seen: Mapping[str, _Seen], call: _Call) -> None:
        attended = self._attend(name, heads, seen, call).flatten(0, 1)  # [samples * tokens, output heads, in]
        mixing = value_mixing(self._output.weight().to(self._sums[name].column.dtype), attended.shape[1], len(heads))
        grouped = attended.unflatten(1, (len(heads), -1))
        for number, head in enumerate(heads):
            for effective in torch.einsum("thi,hk->kti", grouped[:, number].to(mixing.dtype), mixing[number]):
                self._add(name, head, effective)

    def _attend(self, name: str, heads: Sequence[int], seen: Mapping[str, _Seen], call: _Call) -> Tensor:
        """Return ``A_h X [samples, tokens, output heads, in]``: the module mixes slices of ``X`` as it mixes values."""
        parts = []
        for part in seen[name].input.split(self._head_dim, dim=-1):
            missing = self._head_dim - part.shape[-1]
            values = nn.functional.pad(part, (0, missing))[:, :, None].expand(-1, -1, len(heads), -1)
            parts.append(self._mix(name, heads, values, seen, call)[..., : part.shape[-1]])
        return torch.cat(parts, dim=-1)

    def _mix(self, name: str, heads: Sequence[int], values: Tensor, seen: Mapping[str, _Seen], call: _Call) -> Tensor:
        """Return the output layer's input with ``values [samples, tokens, value heads, m]`` in the heads' place.

        ``[samples, tokens, output heads, m]``; the module is run up to its output layer, its other layers' outputs
        being known.
        """
        replaced = self._split(name, seen[name].output.detach()).clone()
        replaced[:, :, list(heads)] = values.to(replaced.dtype)
        outputs = {other: each.output.detach() for other, each in seen.items()} | {name: replaced.flatten(2)}
        caught: list[Tensor] = []

        def catch(x: Tensor) -> Tensor:
            caught.append(x)
            raise _Caught

        with ExitStack() as stack, torch.no_grad(), suppress(_Caught):
            for other, output in outputs.items():
                stack.enter_context(_forward(self.layers[other].module, lambda _, output=output: output))
            stack.enter_context(_forward(self._output.module, catch))
            args, kwargs = call
            self.module(*args, **kwargs)
        mixed: Tensor = caught[0].unflatten(-1, (-1, self._head_dim))
        return mixed


class _Caught(Exception):
    """The output layer's input is known; the rest of the forward pass is not needed."""


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Let a module do something else while the context lasts."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class's own method shows again


def value_mixing(output_weight: Tensor, heads: int, value_heads: int) -> Tensor:
    """Return ``C [value heads, r, r]`` with ``(C C^T)_hh' = tr(W_O,h^T W_O,h')`` for the ``r`` heads of a value head.

    ``sum_hh' tr(W_O,h^T W_O,h') (A_h X)^T (A_h' X) = sum_k Y_k^T Y_k`` with ``Y_k = sum_h C_hk A_h X``.

    Args:
        output_weight: ``W_O [out, heads * m]``.
        heads: number of query heads.
        value_heads: number of value heads; as many consecutive query heads share one.
    """
    by_head: Tensor = output_weight.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1)  # [heads, out * m]
    by_group: Tensor = by_head.unflatten(0, (value_heads, -1))
    values, vectors = torch.linalg.eigh(by_group @ by_group.transpose(1, 2))
    root: Tensor = vectors * values.clamp(min=0).sqrt()[:, None, :]
    return root


def random_signs(shape: Sequence[int], key: tuple[int, ...]) -> Tensor:
    """Return +1 and -1 with equal chances, the same for a key wherever and however samples are batched."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.int8) * 2 - 1
