"""The Hessians of one attention (or feed-forward) module's layers, of an error at the module's output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aptq.api import AptqError, Block, CurvatureSum
from aptq.hessians.attended import value_hessians, value_mixing
from aptq.hessians.attention_roles import Roles, all_alike, find_roles
from aptq.hessians.gram import add_gram, empty_sum, mirror
from aptq.hessians.module_run import ModuleRun, Watched, run_module
from aptq.models.structure import find_layers


@dataclass(frozen=True)
class Measurement:
    """The options of ``aptq.hessians.attention.Attention``."""

    probes: int
    by_head: bool
    exact_values: bool
    cotangent: str
    seed: int


class AttentionPart:
    """One module; ``layers`` are those that are measured here: all but the last, the output layer.

    The objective is ``||dF||^2`` or, with ``weights`` ``w [all samples, tokens]``, ``sum_t w_t ||dF_t||^2 / 2``. Rows
    have a curvature of their own where the module has heads and each has its own Hessian.
    """

    def __init__(
        self, name: str, module: nn.Module, block: Block, how: Measurement, weights: Tensor | None = None
    ) -> None:
        self.name, self.module = name, module
        self._how, self._block_index = how, block.index
        self._weights, self._factor = weights, 2.0 if weights is None else 1.0
        all_layers = find_layers(module, name)
        if not all_layers:
            raise AptqError(f"{name} has no linear layers, and hessian=attention measures them; use hessian=input.")
        *before, self.last = all_layers
        self.layers = {each: block.layers[each] for each in before if each in block.layers}
        self._watched = Watched(name, module, self.layers, all_layers[self.last], getattr(module, "head_dim", 0))
        self._roles: Roles | None = None
        self._mixing: Tensor | None = None
        self._sums = {each: self._empty(each) for each in self.layers}

    def _empty(self, name: str) -> CurvatureSum:
        heads = self._watched.heads(name) if self._how.by_head else 1
        total = empty_sum(self.layers[name], heads)
        if self._how.by_head and self._watched.head_dim:
            rows = self.layers[name].shape[0] // heads
            total.row = total.column.new_zeros(heads, rows, rows)
        return total

    def sums(self) -> dict[str, CurvatureSum]:
        """Return the sums of the layers; call once, after the last ``add``."""
        for name, total in self._sums.items():
            mirror(total.column)
            if total.row is not None:
                if self._roles is not None and name in self._roles.values:
                    self._set_value_rows(total.row, total.column, self._roles.values[name])
                mirror(total.row)
        return self._sums

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], samples: Sequence[int]) -> None:
        """Measure one call of the module; ``samples`` are the numbers of its samples, 0, 1, ... where not given."""
        if not self.layers:
            return
        run = run_module(self._watched, (args, kwargs))
        numbers = samples or range(len(run.output))
        token_weights = None if self._weights is None else self._weights[list(numbers)].to(run.output)
        if self._roles is None:
            ones = self._how.cotangent == "ones"  # the paper's formula, for all alike
            self._roles = all_alike(self._watched) if ones else find_roles(self._watched, run, self._how.exact_values)
        local = self._add_gradients(run, numbers, self._roles, token_weights)
        for name, heads in self._roles.local.items():
            self._add_weighted(name, heads, run.seen[name].input, local[name])
        for name, heads in self._roles.values.items():
            self._add_values(name, heads, run, token_weights)
        for name, each in run.seen.items():
            self._sums[name].tokens += each.input.shape[0] * each.input.shape[1]

    # ----------------------------------------------------------------------------------------------- gradients

    def _add_gradients(
        self, run: ModuleRun, samples: Sequence[int], roles: Roles, token_weights: Tensor | None
    ) -> dict[str, Tensor]:
        """Add ``g^T g`` where there is no better; return ``E||g_t||^2`` of every head ``[samples, tokens, heads]``."""
        weights: dict[str, Tensor] = {}
        cotangents = list(self._cotangents(run.output, samples))
        outputs = [each.output for each in run.seen.values()]
        for number, (share, cotangent) in enumerate(cotangents):
            more = number + 1 < len(cotangents)
            if token_weights is not None:
                cotangent = cotangent * token_weights[..., None].sqrt()
            found = torch.autograd.grad(run.output, outputs, cotangent, retain_graph=more)
            for (name, each), gradient in zip(run.seen.items(), found, strict=True):
                by_head = self._watched.split(name, gradient).to(self._sums[name].column.dtype)
                x = each.input.to(by_head.dtype)
                if name in roles.local:
                    squares = by_head.square().sum(-1) * share
                    weights[name] = weights[name] + squares if name in weights else squares
                    self._add_local_rows(name, roles.local[name], x, by_head, share)
                for head in roles.others[name]:
                    whole = by_head[:, :, head].transpose(1, 2) @ x  # [samples, rows, in]
                    self._add(name, head, whole.flatten(0, 1), share)
                    self._add_row(name, head, (whole @ whole.transpose(1, 2)).sum(0), share)
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
                keys = [(self._how.seed, self._block_index, sample, probe) for sample in samples]
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
        """Add ``r r^T`` (twice, without weights) for each of ``rows [*, in]``, for an average row of the weight."""
        column = self._sums[name].column[head if self._how.by_head else 0]
        add_gram(column, rows, self._factor * share / self._averaged(name))

    def _averaged(self, name: str) -> int:
        """Return over how many rows of its weight a Hessian of a layer is an average."""
        rows = self.layers[name].shape[0]
        return rows // self._watched.heads(name) if self._how.by_head else rows

    def _add_local_rows(self, name: str, heads: Sequence[int], x: Tensor, by_head: Tensor, share: float) -> None:
        """Add ``||x_t||^2 g_t g_t^T`` for gradients ``[samples, tokens, heads, rows]`` that are independent over t."""
        if self._sums[name].row is not None:
            scaled = (by_head * x.square().sum(-1).sqrt()[..., None, None])[:, :, list(heads)].flatten(0, 1)
            for head, matrix in zip(heads, torch.einsum("thr,ths->hrs", scaled, scaled), strict=True):
                self._add_row(name, head, matrix, share)

    def _add_row(self, name: str, head: int, matrix: Tensor, share: float = 1.0) -> None:
        """Add ``g g^T [rows, rows]`` (twice, without weights) for an average column of the weight."""
        row = self._sums[name].row
        if row is not None:
            row[head] += matrix * (self._factor * share / self.layers[name].shape[1])

    def _set_value_rows(self, row: Tensor, column: Tensor, heads: Sequence[int]) -> None:
        """Give values the rows ``W_O,h^T W_O,h``: for a head of its own the Hessian is its product with the columns'.

        A value head that several query heads share has a sum of such products, of which the product of two sums is so
        poor a picture that rounding by it did harm: its rows count alike.
        """
        dim, in_features = self._watched.head_dim, column.shape[-1]
        weight = self._watched.output.weight().to(row.dtype).unflatten(1, (-1, dim))  # [out, query heads, m]
        alone = weight.shape[1] == len(heads)
        for number, head in enumerate(heads):
            metric = weight[:, number].T @ weight[:, number] if alone else torch.eye(dim).to(row)
            trace = column[head].trace() / in_features
            row[head] = metric * (trace * dim / metric.trace().clamp(min=torch.finfo(metric.dtype).tiny))

    # -------------------------------------------------------------------------------------------------- values

    def _add_values(self, name: str, heads: Sequence[int], run: ModuleRun, token_weights: Tensor | None) -> None:
        column = self._sums[name].column
        if self._mixing is None:
            weight = self._watched.output.weight().to(column.dtype)
            self._mixing = value_mixing(weight, weight.shape[1] // self._watched.head_dim, len(heads))
        found = value_hessians(self._watched, name, heads, run, self._mixing, token_weights)
        for head, matrix in zip(heads, found, strict=True):
            column[head if self._how.by_head else 0].add_(matrix, alpha=self._factor / self._averaged(name))


def random_signs(shape: Sequence[int], key: tuple[int, ...]) -> Tensor:
    """Return +1 and -1 with equal chances, the same for a key wherever and however samples are batched."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.int8) * 2 - 1
