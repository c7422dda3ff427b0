"""What an error of the input embedding's table costs where a head is tied to it: the predictions, above all."""

from __future__ import annotations

from collections.abc import Callable

import torch

from aptq.api import Curvature, CurvatureSum
from aptq.calibration.distribute import reduce_to_owners
from aptq.calibration.walk import Walk

_LOOKUPS = 0.1
"""What an error costs where rows are looked up, as a share of what it costs on average in the head.

Measured: rounded to 4 bits for one of them alone, SmolLM2-135M's table costs 0.008 nats in lookups and 0.11 in the head
(``docs/embeddings.md``). Lookups are as sensitive to one input as to another, as far as this goes.
"""


def head_curvature(walk: Walk, on_block: Callable[[int, str], None] = lambda done, name: None) -> Curvature | None:
    """Return the curvature of the table's rows on the first rank; None on others, and where no head is tied to it.

    With ``h_t [hidden]`` the head's input at token ``t`` of the original model, row ``i`` of the table gives the logit
    ``e_i h_t``, and an error ``d`` of it costs, per token, ``d H d^T / 2`` with

        H = G + s mean(diag G) I,    G = 2 / T sum_t h_t h_t^T,

    ``s`` being the share of lookups (``_LOOKUPS``). The softmax weighs row ``i`` by how often its token is expected,
    and lookups by how often it occurs, which is the same for all inputs of a row: it does not change what is best for
    the row.

    Args:
        walk: over the calibration samples, of the original model. One forward pass is run.
        on_block: called before each block with the number of blocks that are done, and its name.

    Raises:
        AptqError: activations stop being finite.
    """
    embedding = walk.source.embedding
    if embedding is None or embedding.head is None:
        return None
    own = walk.between({})  # its hidden states go with it
    own.guidance = None
    for step in own.blocks():
        on_block(step.block.index, step.block.name)
        step.run()
    width, device = embedding.shape[1], walk.fabric.device
    total = torch.zeros(1, width, width, dtype=torch.promote_types(embedding.table.dtype, torch.float32), device=device)
    tokens = 0
    for batch in own.head_inputs(embedding.head):
        states = batch.hidden.reshape(-1, width).to(total)
        total[0].addmm_(states.T, states, alpha=2.0)
        tokens += len(states)
    sums = {embedding.head: CurvatureSum(column=total, tokens=tokens)}
    found = reduce_to_owners(sums, {embedding.head: 0}, walk.total_tokens, walk.fabric).get(embedding.head)
    if found is not None:
        diagonal = found.column.diagonal(dim1=1, dim2=2)
        diagonal += _LOOKUPS * diagonal.mean()
    return found
