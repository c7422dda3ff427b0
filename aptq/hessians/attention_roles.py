"""What the layers of an attention module are to it, found by looking and trying, not by names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aptq.api import AptqError
from aptq.hessians.attended import attended_inputs
from aptq.hessians.module_run import ModuleRun, Watched

_log = logging.getLogger(__name__)
_TOLERANCE = 1e-3  # of the largest entry, when the closed form of the values is held against the module
_TOLERANCE_HALF = 5e-2  # the same in 16 bits


@dataclass(frozen=True)
class Roles:
    """By layer, the heads whose Hessian is found in each of three ways."""

    local: Mapping[str, Sequence[int]]  # used at their own token alone: queries
    values: Mapping[str, Sequence[int]]  # in closed form
    others: Mapping[str, Sequence[int]]  # from whole gradients


def all_alike(watched: Watched) -> Roles:
    """Return the roles under which every head is measured by whole gradients."""
    return Roles(local={}, values={}, others={name: range(watched.heads(name)) for name in watched.layers})


def find_roles(watched: Watched, run: ModuleRun, exact_values: bool) -> Roles:
    """Tell from a run of the module what its layers are; the run's graph is kept.

    Raises:
        AptqError: outputs depend on later tokens: the module was run without its causal mask.
    """
    _check_causal(watched, run)
    local = _find_local(watched, run)
    values = _find_values(watched, local, run) if exact_values else {}
    others = {
        name: [h for h in range(watched.heads(name)) if h not in (*local.get(name, ()), *values.get(name, ()))]
        for name in run.seen
    }
    return Roles(local=local, values=values, others=others)


def _check_causal(watched: Watched, run: ModuleRun) -> None:
    half = run.output.shape[1] // 2
    for name, gradient in _gradients(run, slice(0, half)).items():
        if bool(gradient[:, half:].any()):
            raise AptqError(
                f"{watched.name}: outputs depend on what {name} makes of later tokens, so its causal mask is missing, "
                "and Hessians of such attention would be wrong. Use hessian=input, or report the model."
            )


def _gradients(run: ModuleRun, tokens: slice) -> dict[str, Tensor]:
    """Return the gradients that the sum of some tokens' outputs has at the layers' outputs."""
    cotangent = torch.zeros_like(run.output)
    cotangent[:, tokens] = 1.0
    found = torch.autograd.grad(run.output, [each.output for each in run.seen.values()], cotangent, retain_graph=True)
    return dict(zip(run.seen, found, strict=True))


def _find_local(watched: Watched, run: ModuleRun) -> dict[str, list[int]]:
    """Tell which heads are used at their own token alone, by a look at gradients.

    The later tokens' outputs depend on earlier keys and values, and on no earlier query.
    """
    tokens = run.output.shape[1]
    local = {}
    for name, gradient in _gradients(run, slice(tokens // 2, None)).items():
        early = watched.split(name, gradient)[:, : tokens // 2].abs().sum((0, 1, 3))
        local[name] = [head for head, value in enumerate(early.tolist()) if value == 0.0 and tokens > 1]
    return {name: heads for name, heads in local.items() if heads}


def _find_values(watched: Watched, local: Mapping[str, list[int]], run: ModuleRun) -> dict[str, list[int]]:
    """Find the heads whose closed form gives the output layer's input; empty where none does."""
    if not watched.head_dim:
        return {}
    if run.ends_with_output_layer:
        for name in reversed(list(run.seen)):  # values come after keys, more often than not
            rest = [head for head in range(watched.heads(name)) if head not in local.get(name, ())]
            half = len(rest) // 2
            for heads in (
                [rest[half:], rest[:half]] if name in local else [rest]
            ):  # one matrix for queries, keys, values
                if heads and _are_values(watched, name, heads, run):
                    return {name: heads}
    _log.info("%s: its values have no closed form that is known; random cotangents measure them.", watched.name)
    return {}


def _are_values(watched: Watched, name: str, heads: Sequence[int], run: ModuleRun) -> bool:
    """Whether the output layer is fed with ``A_h (X W_V^T + b)`` for these heads."""
    width = watched.output.shape[1]
    if run.mixed is None or width % (watched.head_dim * len(heads)):
        return False
    if len(run.attentions) == 1 and run.attentions[0].query.shape[1] * watched.head_dim != width:
        return False
    by_head = run.mixed.unflatten(-1, (len(heads), -1, watched.head_dim))  # [samples, tokens, value heads, r, m]
    tolerance = (_TOLERANCE if by_head.dtype.itemsize >= 4 else _TOLERANCE_HALF) * by_head.abs().max()
    weight = _rows_of(watched, name, watched.layers[name].weight())
    bias = getattr(watched.layers[name].module, "bias", None)
    for number, attended in enumerate(attended_inputs(watched, name, heads, run)):
        expected = attended @ weight[heads[number]].T.to(attended.dtype)  # [samples, r, tokens, m]
        if bias is not None:
            expected += _rows_of(watched, name, bias)[heads[number]].to(expected.dtype)
        if not bool((expected.transpose(1, 2) - by_head[:, :, number]).abs().max() <= tolerance):
            return False
    return True


def _rows_of(watched: Watched, name: str, rows: Tensor) -> Tensor:
    by_head: Tensor = rows.unflatten(0, (watched.heads(name), -1))
    return by_head
