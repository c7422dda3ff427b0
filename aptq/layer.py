"""A linear layer that keeps its weight packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from aptq.api import ActivationQuantizer, AptqError, Backend, Format, LayerSpec, Option, Transform, transforms_inputs
from aptq.backends.select import Choice, choose_backend
from aptq.packed import PackedModule

_PREPACKED = "prepacked_"


class PackedLinear(PackedModule):
    """``y = x W^T + b`` with ``W [out, in]``, or ``W T`` of a transform, stored as the packed tensors of a format.

    The packed tensors are buffers (see ``PackedModule``), so that the state dict of a loaded model is the checkpoint
    again; a head that is tied to a packed embedding has none, and multiplies by the embedding's. What a backend makes
    of them at load is kept beside them, out of the state dict; tensors that a backend uses as they are stay shared.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is a bias ``[out]``, a parameter in ``dtype``.
        format: what the codes mean.
        format_name: the format's name in the registry; backends decide by it.
        option: bits and group size of this layer.
        dtype: of the activations; default: torch's default dtype.
        activation: what quantizes the inputs; default: nothing.
        transform: the basis that the weight is stored in, and inputs are quantized in; default: the model's own.
        holder: the packed embedding whose table ``[out, in]`` is the weight; default: the layer has its own.

    Raises:
        AptqError: when the format cannot store a layer of this shape at this option, or inputs of this width cannot be
            quantized so.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        format: Format,
        format_name: str,
        option: Option,
        dtype: torch.dtype | None = None,
        activation: ActivationQuantizer | None = None,
        transform: Transform | None = None,
        holder: PackedModule | None = None,
    ) -> None:
        shape = (out_features, in_features)
        super().__init__(shape, format=format, format_name=format_name, option=option, dtype=dtype, holder=holder)
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.transform = transform
        if activation is not None:
            activation.check(in_features)
        if transform is not None:
            transform.check(in_features)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=self.dtype)) if bias else None
        self.choice: Choice | None = None  # of select_backend
        self._requested: str | Mapping[str, Any] = "auto"
        self._installed: Mapping[str, Backend] | None = None
        self._spec = self._make_spec()
        self._reads: dict[str, str] = {}  # name that the backend reads -> attribute that holds it
        self._turns = transform is not None  # whether inputs are to be transformed before the backend has them

    def dense(self) -> Tensor:
        """Return ``W [out, in]`` in float32: what is stored, in the model's own basis."""
        return self.stored() if self.transform is None else self.transform.invert(self.stored())

    def select_backend(
        self, backend: str | Mapping[str, Any] = "auto", installed: Mapping[str, Backend] | None = None
    ) -> None:
        """Choose what multiplies this layer, and let it prepare its tensors; call once the tensors are loaded.

        Moving the layer to another device or dtype later chooses again.

        Args:
            backend: a backend's name, or a mapping with its name and options; or "auto" for the best that accepts this
                layer.
            installed: backends to choose from by name; default: all that are installed.

        Raises:
            AptqError: when the named backend, or every one, refuses this layer.
        """
        self._clear_prepacked()
        spec = self._make_spec()
        choice = choose_backend(spec, backend, installed)
        tensors = self.packed()
        for name, tensor in choice.backend.prepack(tensors, spec).items():
            if tensor is tensors.get(name):
                self._reads[name] = name
            else:
                self._reads[name] = _PREPACKED + name
                self.register_buffer(_PREPACKED + name, tensor, persistent=False)
        self.choice, self._requested, self._installed, self._spec = choice, backend, installed, spec
        self._turns = self.transform is not None and not transforms_inputs(choice.backend, spec)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b`` for ``x [..., in]`` (float32, float16 or bfloat16), as ``[..., out]`` in its dtype."""
        if self.choice is None:
            raise AptqError(
                "This packed layer has no backend yet: load the model with from_pretrained or aptq.load, "
                "or call select_backend() after loading its tensors."
            )
        if self._holders:
            return self._forward_tied(x)
        buffers = self._buffers  # get_buffer() takes as long as a small product
        tensors = {name: buffers[attribute] for name, attribute in self._reads.items()}
        if self._turns:
            x = self.transform.apply(x)  # type: ignore[union-attr]  # there is one
        y = self.choice.backend.matmul(x, tensors, self._spec)  # type: ignore[arg-type]  # each is a tensor
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _forward_tied(self, x: Tensor) -> Tensor:
        """Multiply where the embedding is: it is moved by itself, in a model on several devices to another one."""
        if self._spec.device != self.device:
            self.select_backend(self._requested, self._installed)
        assert self.choice is not None
        tensors = {
            name: (self if attribute.startswith(_PREPACKED) else self.holder).get_buffer(attribute)
            for name, attribute in self._reads.items()
        }
        y = self.choice.backend.matmul(x.to(self.device), tensors, self._spec).to(x.device)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Tell shape, bits, group size, format and backend."""
        backend = "none yet" if self.choice is None else type(self.choice.backend).__name__
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.option.bits}, group_size={self.option.group_size}, format={self.format_name}, "
            f"{'' if self.activation is None else f'activation={self.activation}, '}"
            f"{'' if self.transform is None else f'transform={self.transform}, '}backend={backend}"
        )

    def _make_spec(self) -> LayerSpec:
        return LayerSpec(
            out_features=self.out_features,
            in_features=self.in_features,
            format=self.format,
            format_name=self.format_name,
            option=self.option,
            dtype=self.dtype,
            device=self.device,
            activation=self.activation,
            transform=self.transform,
        )

    def _clear_prepacked(self) -> None:
        for attribute in self._reads.values():
            if attribute.startswith(_PREPACKED):
                delattr(self, attribute)
        self._reads, self.choice = {}, None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the layer, and choose a backend for the place where it is then."""
        device, dtype = self._spec.device, self.dtype
        super()._apply(fn, recurse)
        changed = self.dtype != dtype or self.device != device
        if changed and self.choice is not None and self.device.type != "meta":
            self.select_backend(self._requested, self._installed)
        return self


@contextmanager
def dense_weights(model: nn.Module) -> Iterator[None]:
    """Let a model's packed layers multiply with dense copies of their weights while the context lasts.

    For many small forward passes where the backend would unpack each time. Same values, memory of the dense model.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for layer in layers:
        # In the basis of storage: where inputs are quantized they are quantized there, and results are the backend's.
        layer.forward = partial(_multiply, layer, layer.stored().to(layer.dtype))  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own method shows again


def _multiply(layer: PackedLinear, weight: Tensor, x: Tensor) -> Tensor:
    x = x if layer.transform is None else layer.transform.apply(x)
    return functional.linear(x if layer.activation is None else layer.activation.quantize(x), weight, layer.bias)
