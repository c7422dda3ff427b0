"""Where our operators of torch are defined, and what products with a packed weight have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OPERATORS = torch.library.Library("aptq", "FRAGMENT")


def plain(x: Tensor) -> bool:
    """Return whether an operator's work may be done on ``x`` without the operator, whose cost small layers would feel.

    Tensors without data, gradients, and graphs that are being traced have to meet the operator.
    """
    return type(x) is Tensor and not torch.compiler.is_compiling() and not (x.requires_grad and torch.is_grad_enabled())


def define_product(
    name: str,
    arguments: str,
    product: Callable[..., Tensor],
    device: str,
    *,
    weight: str = "Tensor qweight, Tensor scales",
    fake: Callable[..., Tensor] | None = None,
) -> None:
    """Define ``torch.ops.aptq.<name>``, which compiled and captured graphs can hold.

    Args:
        name: of the operator.
        arguments: behind ``x [..., in]`` and ``weight``, as in a schema of torch.
        product: what it does: returns ``[..., out]`` in the dtype of ``x``.
        device: of the tensors that it takes, a dispatch key of torch ("CPU", "CUDA").
        weight: arguments behind ``x``; scales are ``[groups, out]``.
        fake: gives an empty result of the product's shape; default: as wide as ``scales``.
    """
    schema = f"{name}(Tensor x, {weight}, {arguments}) -> Tensor"
    OPERATORS.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    OPERATORS.impl(name, product, device)
    torch.library.register_fake(f"aptq::{name}", fake or _fake, lib=OPERATORS)


def _fake(x: Tensor, qweight: Tensor, scales: Tensor, *rest: object) -> Tensor:
    del qweight, rest
    return x.new_empty(*x.shape[:-1], scales.shape[1])
