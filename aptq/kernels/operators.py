"""Where our operators of torch are defined, and what products with a packed weight have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

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


Products = Callable[[Tensor], list[Tensor]]
"""Of activations ``x [..., in]``: ``x W^T [..., out]`` for each of some weights."""

Binder = Callable[[Sequence[tuple[Any, ...]]], Products]
"""Takes the arguments behind ``x`` of an operator's products that read one ``x``, and returns them as one function."""


class Bound:
    """Products with some packed weights, as a function of the activations alone.

    ``torch.ops.aptq.bound`` finds it by its number while somebody holds it. What can be done for a weight once is done
    here, so that products are as fast as their kernels, where layers are small.

    Args:
        operator: of torch, with its overload.
        arguments: those behind ``x`` of each product; they are held.
        widths: each ``out``.
    """

    def __init__(self, operator: Any, arguments: Sequence[tuple[Any, ...]], widths: list[int]) -> None:
        self.products, self.widths = _binders[operator](arguments), widths
        self.number = next(_numbers)
        _bound[self.number] = self


_numbers = count()
_bound: WeakValueDictionary[int, Bound] = WeakValueDictionary()
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


def _products(x: Tensor, number: int, widths: list[int]) -> list[Tensor]:
    del widths
    return _bound[number].products(x)


def _fake_products(x: Tensor, number: int, widths: list[int]) -> list[Tensor]:
    del number
    return [x.new_empty(*x.shape[:-1], width) for width in widths]


OPERATORS.define("bound(Tensor x, int number, int[] widths) -> Tensor[]", tags=_TAGS)
OPERATORS.impl("bound", _products, "CompositeExplicitAutograd")
torch.library.register_fake("aptq::bound", _fake_products, lib=OPERATORS)
