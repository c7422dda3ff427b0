"""Layers that those who serve a model run as one."""

from __future__ import annotations

from collections.abc import Iterable

_TOGETHER = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),  # Mixtral's names for gate and up
)
"""Names of modules beside each other that read the same input: one matrix multiplication when they are stacked."""


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """Return the groups of layers that need the same option to be run as one, in the order of the model.

    They are query, key and value; gate and up; and all experts of a mixture, which are one kernel's work. A layer that
    is alone in its group is left out.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        experts, found, _ = name.partition(".experts.")
        if found:
            groups.setdefault((experts, len(_TOGETHER)), []).append(name)
            continue
        for number, together in enumerate(_TOGETHER):
            if own in together:
                groups.setdefault((parent, number), []).append(name)
    return [group for group in groups.values() if len(group) > 1]
