"""What the name of a layer tells."""

from __future__ import annotations


def place(name: str) -> tuple[int | None, str]:
    """Split a layer's name into depth and kind: ``model.layers.3.mlp.up_proj`` into 3 and ``mlp.up_proj``.

    Experts of a mixture share a kind, as ``mlp.experts.*.up_proj``; a layer outside the blocks has no depth.
    """
    parts = name.split(".")
    depth = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    if depth is None:
        return None, name
    return int(parts[depth]), ".".join("*" if part.isdigit() else part for part in parts[depth + 1 :])
