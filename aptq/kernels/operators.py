"""Where our operators of torch are defined, and what products with a packed weight have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

OPERATORS = torch.library.Library("aptq", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)


def plain(x: Tensor) -> bool:
    """Return whether an operator's work may be done on ``x`` without the operator, whose cost small layers would feel.

    Tensors without data, gradients, and graphs that are being traced have to meet the operator.
    """
    traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return type(x) is Tensor and not traced and not (x.requires_grad and torch.is_grad_enabled())


Product = Callable[[Tensor], Tensor]
"""Of activations ``x [..., in]``: ``x W^T [..., out]`` for some weights, whose outputs lie beside each other."""

Binder = Callable[[Sequence[tuple[Any, ...]], Tensor], Product]
"""Takes the arguments behind ``x`` of an operator's products that read one ``x``, and an ``x`` whose shape and dtype
all will have; returns the products as one function."""


class Bound:
    """Products with some packed weights, as a function of activations of one shape and dtype.

    ``torch.ops.aptq.bound`` finds it by its number while somebody holds it. What can be done for a weight once is done
    here, so that products are as fast as their kernels, where layers are small.

    Args:
        operator: of torch, with its overload.
        arguments: those behind ``x`` of each product; they are held.
        like: activations of the shape and dtype; values are not read.
    """

    def __init__(self, operator: Any, arguments: Sequence[tuple[Any, ...]], like: Tensor) -> None:
        self.number = next(_numbers)
        _bound[self.number] = _binders[operator](arguments, like)
        finalize(self, _bound.pop, self.number)


_numbers = count()
_bound: dict[int, Product] = {}
_binders: dict[Any, Binder] = {}


def binds(operator: Any) -> bool:
    """Return whether an operator of torch is a product that ``Bound`` takes."""
    return operator in _binders


def define_product(
    name: str,
    arguments: str,
    product: Callable[..., Tensor],
    device: str,
    *,
    weight: str = "Tensor qweight, Tensor scales",
    fake: Callable[..., Tensor] | None = None,
    binder: Binder | None = None,
) -> None:
    """Define ``torch.ops.aptq.<name>``, which compiled and captured graphs can hold.

    Args:
        name: of the operator.
        arguments: behind ``x [..., in]`` and ``weight``, as in a schema of torch.
        product: what it does: returns ``[..., out]`` in the dtype of ``x``.
        device: of the tensors that it takes, a dispatch key of torch ("CPU", "CUDA").
        weight: arguments behind ``x``; scales are ``[groups, out]``.
        fake: gives an empty result of the product's shape; default: as wide as ``scales``.
        binder: what ``Bound`` makes its products by.
    """
    schema = f"{name}(Tensor x, {weight}, {arguments}) -> Tensor"
    OPERATORS.define(schema, tags=_TAGS)
    OPERATORS.impl(name, product, device)
    torch.library.register_fake(f"aptq::{name}", fake or _fake, lib=OPERATORS)
    if binder is not None:
        _binders[getattr(torch.ops.aptq, name).default] = binder


def _fake(x: Tensor, qweight: Tensor, scales: Tensor, *rest: object) -> Tensor:
    del qweight, rest
    return x.new_empty(*x.shape[:-1], scales.shape[1])


def _bound_product(x: Tensor, number: int, width: int) -> Tensor:
    del width
    return _bound[number](x)


def _fake_bound_product(x: Tensor, number: int, width: int) -> Tensor:
    del number
    return x.new_empty(*x.shape[:-1], width)


OPERATORS.define("bound(Tensor x, int number, int width) -> Tensor", tags=_TAGS)
OPERATORS.impl("bound", _bound_product, "CompositeExplicitAutograd")
torch.library.register_fake("aptq::bound", _fake_bound_product, lib=OPERATORS)
