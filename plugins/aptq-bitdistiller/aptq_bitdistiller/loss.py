"""What a student is trained on: divergences from its teacher, token by token, and the teacher's confidence.

``p`` is the teacher's distribution of the next token and ``q`` the student's. CAKLD (confidence-aware Kullback-Leibler
divergence) is ``gamma KL(q || p) + (1 - gamma) KL(p || q)``, with ``gamma`` the probability that the teacher gives, on
average, to the tokens of the text: a teacher that is sure has one mode to seek, which the reverse divergence ``KL(q ||
p)`` does; one that is not has many to cover, which the forward divergence ``KL(p || q)`` does.

Source: Du et al., "BitDistiller: Unleashing the Potential of Sub-4-Bit LLMs via Self-Distillation" (ACL 2024, arXiv
2402.10631), section 3.2. It has no temperature but in the sampling of the text, and neither have these.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def divergence(student: Tensor, teacher: Tensor, gamma: float) -> Tensor:
    """Return ``gamma KL(q || p) + (1 - gamma) KL(p || q)`` of each prediction ``[...]``, in nats.

    Args:
        student: logits ``[..., vocabulary]`` of ``q``.
        teacher: logits of ``p``, of the same shape.
        gamma: the share of the reverse divergence; 1 is ``KL(q || p)`` alone, 0 is ``KL(p || q)``.
    """
    log_q, log_p = functional.log_softmax(student, -1), functional.log_softmax(teacher, -1)
    # Both sums are of (log q - log p), weighed by gamma q - (1 - gamma) p: one tensor less of the vocabulary's size.
    weight: Tensor | float = 0.0
    if gamma > 0:
        weight = weight + gamma * log_q.exp()
    if gamma < 1:
        weight = weight - (1 - gamma) * log_p.exp()
    return (weight * (log_q - log_p)).sum(-1)


def cross_entropy(student: Tensor, tokens: Tensor) -> Tensor:
    """Return ``-log q(token)`` of each prediction ``[...]``, in nats, for logits ``[..., vocabulary]``."""
    losses = functional.cross_entropy(student.flatten(0, -2), tokens.flatten(), reduction="none")
    return losses.view(tokens.shape)


def confidence(teacher: Tensor, tokens: Tensor) -> Tensor:
    """Return ``p(token)`` of each token ``[...]`` under logits ``[..., vocabulary]``: its mean over a text is gamma."""
    chosen = teacher.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return torch.exp(chosen - teacher.logsumexp(-1))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the values ``[...]`` where the mask ``[...]`` (bool) is set; 0 where it is nowhere."""
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)
