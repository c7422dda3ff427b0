"""Mixtures of experts with every expert's matrices as linear layers of their own.

transformers holds all experts of a block in two 3-D parameters, ``gate_up_proj [experts, 2 * intermediate, hidden]``
and ``down_proj [experts, hidden, intermediate]``. Each expert sees other tokens than its siblings, so each of its
matrices needs its own curvature, its own bits and its own name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

__all__ = ["Expert", "UnfusedExperts", "fused_num_experts", "unfuse_experts"]

_log = logging.getLogger(__name__)
_FUSED = ("gate_up_proj", "down_proj")


def _linear(weight: Tensor) -> nn.Linear:
    """Wrap a weight ``[out, in]`` in a module without allocating another."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class Expert(nn.Module):
    """A gated feed-forward network: ``down(act(gate(x)) * up(x))`` with gate and up in one matrix.

    Args:
        gate_up: weight ``[2 * intermediate, hidden]``; the first half of the rows is the gate.
        down: weight ``[hidden, intermediate]``.
        act_fn: the activation, element by element.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up_proj = _linear(gate_up)
        self.down_proj = _linear(down)
        self.act_fn = act_fn

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the expert's output for its tokens, ``[tokens, hidden] -> [tokens, hidden]``."""
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        output: Tensor = self.down_proj(self.act_fn(gate) * up)
        return output


class UnfusedExperts(nn.ModuleList):
    """Experts as a list of modules, called as transformers calls the fused ones."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send every token to its experts and add up what they answer.

        Args:
            hidden_states: ``[tokens, hidden]``.
            top_k_index: ``[tokens, k]``, integer: the experts of each token.
            top_k_weights: ``[tokens, k]``: what each of them counts.

        Returns:
            ``[tokens, hidden]`` in the dtype of ``hidden_states``.
        """
        result = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            if not 0 <= index < len(self):  # transformers marks tokens of other ranks with the number of experts
                continue
            tokens, position = torch.where(top_k_index == index)
            output = self[index](hidden_states[tokens]) * top_k_weights[tokens, position, None]
            result.index_add_(0, tokens, output.to(result.dtype))
        return result


def fused_num_experts(module: nn.Module) -> int | None:
    """Return how many experts a module of fused 3-D weights holds, in whatever layout; None when it is none."""
    sizes = {parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.ndim == 3}
    return sizes.pop() if len(sizes) == 1 else None


def _obstacle(module: nn.Module) -> str | None:
    """Return why experts cannot be taken apart without changing what they compute, or None."""
    parameters = dict(module.named_parameters(recurse=False))
    for flag, wanted, reason in (
        ("is_transposed", False, "transposed weights"),
        ("has_bias", False, "biases"),
        ("has_gate", True, "no gate"),
        ("is_concatenated", True, "interleaved gate and up rows"),
        ("has_post_expert_norm", False, "a norm after each expert"),
    ):
        if getattr(module, flag, wanted) != wanted:
            return reason
    if set(parameters) != set(_FUSED) or any(parameter.ndim != 3 for parameter in parameters.values()):
        return f"parameters {sorted(parameters)} instead of {sorted(_FUSED)}"
    if not hasattr(module, "is_transposed") or not callable(getattr(module, "act_fn", None)):
        return "not of transformers' experts interface"
    # The decorator gives every class without a gate of its own this one function.
    gate = getattr(type(module), "_apply_gate", None)
    if getattr(gate, "__name__", "") != "_default_apply_gate":
        return "a gate of its own"
    experts, double, hidden = parameters["gate_up_proj"].shape
    if parameters["down_proj"].shape != (experts, hidden, double // 2):
        return "shapes that do not fit each other"
    return None


def _fused_modules(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """Give (parent, attribute, full name, fused experts) for every fused module in a tree."""
    for name, parent in module.named_modules():
        for attribute, child in parent.named_children():
            if fused_num_experts(child) is not None and hasattr(child, "down_proj"):
                yield parent, attribute, f"{name}.{attribute}" if name else attribute, child


def unfuse_experts(module: nn.Module) -> int:
    """Replace every module of fused experts in a tree by ``UnfusedExperts``, in place.

    The matrices become ``<name>.{expert}.gate_up_proj`` and ``<name>.{expert}.down_proj``: views of the fused
    parameters, on whatever device (``meta`` too). Experts of another layout (transposed, with biases, with a gate of
    their own) stay as they are and are named in a warning.

    Args:
        module: any module; the root itself is not replaced.

    Returns:
        How many modules were replaced.
    """
    replaced, left = 0, {}
    for parent, attribute, name, fused in list(_fused_modules(module)):
        obstacle = _obstacle(fused)
        if obstacle is not None:
            left[name] = obstacle
            continue
        gate_up, down = (getattr(fused, key).detach() for key in _FUSED)
        experts = UnfusedExperts(
            Expert(gate_up[index], down[index], fused.act_fn)  # type: ignore[arg-type]
            for index in range(gate_up.shape[0])
        )
        experts.train(fused.training)
        setattr(parent, attribute, experts)
        replaced += 1
    if left:
        name, obstacle = next(iter(left.items()))
        _log.warning("%d modules of experts stay in full precision; %s: %s", len(left), name, obstacle)
    return replaced
