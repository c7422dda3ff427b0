"""What attention makes of its own input: ``A_h X``, the effective input of values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress

import torch
from torch import Tensor, nn

from aptq.hessians.gram import add_gram, add_product
from aptq.hessians.module_run import DotProduct, ModuleRun, Watched, replaced_forward

_CHUNK = 128  # queries whose attention is held at once


def attended_inputs(watched: Watched, name: str, heads: Sequence[int], run: ModuleRun) -> Iterator[Tensor]:
    """Yield ``A_h X [samples, r, tokens, in]`` for each value head: for the ``r`` query heads that share it.

    Args:
        watched: the module.
        name: its layer with the values.
        heads: which of the layer's heads are values.
        run: the module's run.
    """
    x = run.seen[name].input
    if len(run.attentions) == 1:
        (call,) = run.attentions
        yield from (attend(call, shared, x) for shared in _shared(call, len(heads)))
    else:
        mixed = _mix_slices(watched, name, heads, run)  # [samples, tokens, query heads, in]
        yield from mixed.transpose(1, 2).unflatten(1, (len(heads), -1)).unbind(1)


def value_hessians(
    watched: Watched, name: str, heads: Sequence[int], run: ModuleRun, mixing: Tensor, weights: Tensor | None
) -> Iterator[Tensor]:
    """Yield ``sum_t w_t sum_k y_tk y_tk^T [in, in]``, ``Y_k = sum_h C_hk A_h X``, for each value head.

    Only the lower triangles, by strips, are to be used (see ``aptq.hessians.gram``).

    Args:
        watched: the module.
        name: its layer with the values.
        heads: which of the layer's heads are values.
        run: the module's run.
        mixing: ``C [value heads, r, r]``, see ``value_mixing``.
        weights: ``w [samples, tokens]`` of the module's outputs; None for ones.
    """
    x = run.seen[name].input.to(mixing.dtype)
    total = x.new_zeros(x.shape[-1], x.shape[-1])
    if len(run.attentions) == 1:
        (call,) = run.attentions
        for shared, root in zip(_shared(call, len(heads)), mixing, strict=True):
            gram = attention_gram(call, shared, root, weights)
            total.zero_()
            for mine, weighed in zip(x, gram @ x, strict=True):
                add_product(total, mine, weighed)
            yield total
    else:
        for attended, root in zip(attended_inputs(watched, name, heads, run), mixing, strict=True):
            effective = torch.einsum("brti,rk->bkti", attended.to(mixing.dtype), root)
            if weights is not None:
                effective *= weights[:, None, :, None].to(effective.dtype).sqrt()
            total.zero_()
            add_gram(total, effective.flatten(0, 2), 1.0)
            yield total


def _shared(call: DotProduct, value_heads: int) -> Iterator[slice]:
    """Give the query heads that share each value head."""
    shared = call.query.shape[1] // value_heads
    return (slice(start, start + shared) for start in range(0, shared * value_heads, shared))


def attend(call: DotProduct, heads: slice, x: Tensor) -> Tensor:
    """Return ``A_h X [samples, query heads, tokens, in]`` of some query heads for ``x [samples, tokens, in]``."""
    parts = [
        (attention.to(x.dtype).flatten(1, 2) @ x[:, : attention.shape[-1]]).unflatten(1, attention.shape[1:3])
        for _, attention in _attention(call, heads)
    ]
    return torch.cat(parts, dim=2)


def attention_gram(call: DotProduct, heads: slice, root: Tensor, weights: Tensor | None) -> Tensor:
    """Return ``sum_k C_k^T diag(w) C_k [samples, tokens, tokens]`` with ``C_k = sum_h root_hk A_h``.

    With it ``X^T (.) X`` is the Gram matrix of all ``C_k X``, and there is one product with ``X`` for each value head
    and not one for each query head.
    """
    tokens = call.key.shape[2]
    gram = torch.zeros(call.key.shape[0], tokens, tokens, dtype=root.dtype, device=root.device)
    for rows, attention in _attention(call, heads):
        mixed = root.T @ attention.to(root.dtype).flatten(2)  # [samples, r, rows * keys]
        mixed = mixed.unflatten(2, attention.shape[2:])
        if weights is not None:
            mixed *= weights[:, None, rows, None].to(mixed.dtype).sqrt()
        mixed = mixed.flatten(1, 2)
        seen = mixed.shape[-1]
        gram[:, :seen, :seen].baddbmm_(mixed.transpose(1, 2), mixed)
    return gram


def _attention(call: DotProduct, heads: slice) -> Iterator[tuple[slice, Tensor]]:
    """Yield some queries at a time and their attention ``[samples, query heads, queries, keys]``.

    As torch defines ``scaled_dot_product_attention``; keys that a causal mask hides from all of them are left out.
    """
    query = call.query[:, heads]
    shared = call.query.shape[1] // call.key.shape[1]
    key = call.key.repeat_interleave(shared, dim=1)[:, heads] if shared > 1 else call.key[:, heads]
    mask = None if call.mask is None else call.mask.expand(*call.mask.shape[:-2], query.shape[2], key.shape[2])
    if mask is not None and mask.dim() > 2 and mask.shape[-3] > 1:
        mask = mask[..., heads, :, :]
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    for start in range(0, query.shape[2], _CHUNK):
        rows = slice(start, min(start + _CHUNK, query.shape[2]))
        seen = min(rows.stop, key.shape[2]) if call.causal else key.shape[2]
        scores = (query[:, :, rows] @ key[:, :, :seen].transpose(2, 3)).mul_(scale)
        if call.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(start + 1)
            scores.masked_fill_(hidden, float("-inf"))
        if mask is not None and mask.dtype == torch.bool:
            scores.masked_fill_(~mask[..., rows, :seen], float("-inf"))
        elif mask is not None:
            scores += mask[..., rows, :seen]
        yield rows, scores.float().softmax(-1) if scores.dtype.itemsize < 4 else scores.softmax(-1)


def _mix_slices(watched: Watched, name: str, heads: Sequence[int], run: ModuleRun) -> Tensor:
    """Return ``A_h X [samples, tokens, query heads, in]``: the module mixes slices of ``X`` as it mixes values."""
    parts = []
    for part in run.seen[name].input.split(watched.head_dim, dim=-1):
        missing = watched.head_dim - part.shape[-1]
        values = nn.functional.pad(part, (0, missing))[:, :, None].expand(-1, -1, len(heads), -1)
        parts.append(_mix(watched, name, heads, values, run)[..., : part.shape[-1]])
    return torch.cat(parts, dim=-1)


class _Caught(Exception):
    """The output layer's input is known; the rest of the forward pass is not needed."""


def _mix(watched: Watched, name: str, heads: Sequence[int], values: Tensor, run: ModuleRun) -> Tensor:
    """Return the output layer's input with ``values [samples, tokens, value heads, m]`` in the heads' place.

    ``[samples, tokens, query heads, m]``; the module is run up to its output layer, its other layers' outputs being
    known.
    """
    replaced = watched.split(name, run.seen[name].output.detach()).clone()
    replaced[:, :, list(heads)] = values.to(replaced.dtype)
    outputs = {other: each.output.detach() for other, each in run.seen.items()} | {name: replaced.flatten(2)}
    caught: list[Tensor] = []

    def catch(x: Tensor) -> Tensor:
        caught.append(x)
        raise _Caught

    with ExitStack() as stack, torch.no_grad(), suppress(_Caught):
        for other, output in outputs.items():
            forward = lambda _, output=output: output  # noqa: E731
            stack.enter_context(replaced_forward(watched.layers[other].module, forward))
        stack.enter_context(replaced_forward(watched.output.module, catch))
        args, kwargs = run.call
        watched.module(*args, **kwargs)
    mixed: Tensor = caught[0].unflatten(-1, (-1, watched.head_dim))
    return mixed


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
