"""Which backends multiply the layers of a loaded model, and why not others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from aptq.api import Option
from aptq.layer import PackedLinear


def chosen_backends(model: nn.Module) -> list[dict[str, Any]]:
    """Return what ``metrics.json`` tells of a model's packed layers, an object for each backend in the order of layers.

    ``backend`` is its name, ``layers`` how many layers it has, ``options`` how many of each format, bits and group
    size, and ``refusals`` maps the backends that were asked before it to the distinct reasons why they refused one of
    these layers.
    """
    chosen: dict[str, list[tuple[Option, Mapping[str, str]]]] = {}  # by backend: option and refusals of each layer
    for module in model.modules():
        if isinstance(module, PackedLinear) and module.choice is not None:
            chosen.setdefault(module.choice.name, []).append((module.option, module.choice.refusals))
    return [
        {
            "backend": name,
            "layers": len(layers),
            "options": [
                {"format": each.format, "bits": each.bits, "group_size": each.group_size, "layers": count}
                for each, count in sorted(Counter(option for option, _ in layers).items())
            ],
            "refusals": _reasons(refusals for _, refusals in layers),
        }
        for name, layers in chosen.items()
    ]


def _reasons(refusals: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return by who refused the distinct reasons, in the order of layers."""
    reasons: dict[str, dict[str, None]] = {}
    for each in refusals:
        for other, reason in each.items():
            reasons.setdefault(other, {})[reason] = None
    return {other: list(found) for other, found in reasons.items()}
