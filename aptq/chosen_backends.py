"""Which backends multiply the layers of a loaded model, and why not others."""

from __future__ import annotations

from collections import Counter
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
    layers: Counter[str] = Counter()
    options: dict[str, Counter[Option]] = {}
    refusals: dict[str, dict[str, dict[str, None]]] = {}  # by backend and who refused: reasons, in the order of layers
    for module in model.modules():
        if not isinstance(module, PackedLinear) or module.choice is None:
            continue
        name = module.choice.name
        layers[name] += 1
        options.setdefault(name, Counter())[module.option] += 1
        reasons = refusals.setdefault(name, {})
        for other, reason in module.choice.refusals.items():
            reasons.setdefault(other, {})[reason] = None
    return [
        {
            "backend": name,
            "layers": count,
            "options": [
                {"format": each.format, "bits": each.bits, "group_size": each.group_size, "layers": options[name][each]}
                for each in sorted(options[name])
            ],
            "refusals": {other: list(reasons) for other, reasons in refusals[name].items()},
        }
        for name, count in layers.items()
    ]
