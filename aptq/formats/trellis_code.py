"""The code of format ``trellis``: what a run of codes stands for, and which codes stand for given values best.

Codes of ``k`` bits come one after the other; the last ``L`` bits of them are a *state*, and a state stands for a value.
So a value depends on its own code and those before it: of ``2^L`` values only ``2^k`` can follow at a time, and the
best run of codes is found by dynamic programming (Viterbi). For normally distributed values this comes near what is
possible at a rate of ``k`` bits: with ``L = 10`` a mean squared error of 0.072, 0.018 and 0.0048 of the variance at 2,
3 and 4 bits (``benchmarks/trellis_codes.py``), where the best scalar quantizers (Max 1960) are at 0.1175, 0.0345 and
0.0095 and no code can be below 0.0625, 0.0156 and 0.0039.

Source: trellis-coded quantization is Marcellin and Fischer's (IEEE Transactions on Communications 38(1), 1990);
shifting bits as the trellis, and codes that are computed, Tseng et al.'s "QTIP" (NeurIPS 2024). Ours is the code:
quantiles of the normal distribution in the order of a linear congruential sequence, whose multipliers were searched,
by a polynomial in 16-bit integers. Exact quantiles lose as much to a hundredth or so (6 bits: four hundredths more).
"""

from __future__ import annotations

import torch
from torch import Tensor

from aptq.kernels.cpu import kernels_for
from aptq.kernels.quantiles import quantiles

_MULTIPLIERS = {  # by bits of a state and of a code; the scale at which a code's error is least, beside each
    10: {1: (557, 1.26), 2: (759, 1.42), 3: (901, 1.52), 4: (903, 1.52), 5: (953, 1.56), 6: (629, 1.60)},
    12: {1: (2197, 1.24), 2: (1077, 1.42), 3: (1525, 1.48), 4: (3827, 1.50), 5: (131, 1.56), 6: (575, 1.60)},
}
STATE_BITS = tuple(_MULTIPLIERS)
BITS = tuple(_MULTIPLIERS[10])
"""Sizes of states and of codes that there are codes for."""


def values_of_states(bits: int, state_bits: int) -> Tensor:
    """Return what each state stands for, float32 ``[2^state_bits]``: see ``aptq.kernels.quantiles``."""
    multiplier, _ = _MULTIPLIERS[state_bits][bits]
    return quantiles(multiplier, state_bits)


def best_scale(bits: int, state_bits: int) -> float:
    """Return the scale of ``values_of_states`` at which normally distributed values of variance 1 lose least."""
    return _MULTIPLIERS[state_bits][bits][1]


def states_of(codes: Tensor, bits: int, state_bits: int) -> Tensor:
    """Return the states ``[..., rows]``, int32, that codes ``[..., rows]`` lead to; before them all bits are 0."""
    states = codes.int()
    for back in range(1, -(-state_bits // bits)):
        states[..., back:] |= codes[..., : max(0, codes.shape[-1] - back)].int() << (bits * back)
    return states & ((1 << state_bits) - 1)


def best_codes(values: Tensor, scales: Tensor, table: Tensor, bits: int) -> Tensor:
    """Return the codes ``[columns, rows]``, uint8, that stand for values with the least squares, column by column.

    Args:
        values: ``[columns, rows]``, float and finite.
        scales: of each value, likewise: it is to be near ``scale * table[state]``.
        table: what each state stands for, float32 ``[states]``, on the CPU.
        bits: of a code.
    """
    kernels = kernels_for("format=trellis")
    if kernels is None:
        return viterbi(values, scales, table.to(values.device), bits)
    exact, by = (each.to("cpu", torch.float32).contiguous() for each in (values, scales))
    return kernels.trellis(exact, by, table, bits).to(values.device)


def viterbi(values: Tensor, scales: Tensor, table: Tensor, bits: int) -> Tensor:
    """Return ``best_codes`` by operators of torch, in the dtype of ``values``, for what ``table [states]`` says."""
    columns, rows = values.shape
    choices, prefixes = 1 << bits, len(table) >> bits
    shift = (len(table) >> bits).bit_length() - 1
    costs = values.new_full((columns, len(table)), float("inf"))
    costs[:, 0] = 0.0
    came = torch.empty(rows, columns, prefixes, dtype=torch.uint8, device=values.device)
    known = table.to(values.dtype)
    for row in range(rows):
        least, lost = costs.view(columns, choices, prefixes).min(1)
        came[row] = lost
        error = values[:, row, None] - scales[:, row, None] * known
        costs = error.square_().add_(least.repeat_interleave(choices, 1))
    state, codes = costs.argmin(1), torch.empty(columns, rows, dtype=torch.uint8, device=values.device)
    for row in reversed(range(rows)):
        codes[:, row] = state & (choices - 1)
        prefix = state >> bits
        state = prefix | came[row].gather(1, prefix[:, None])[:, 0].long() << shift
    return codes
