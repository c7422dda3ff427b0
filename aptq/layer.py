"""A linear layer that keeps its weight packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from aptq.api import ActivationQuantizer, AptqError, Backend, Format, LayerSpec, Option, Transform
from aptq.backends.select import Choice, choose_backend

_PREPACKED = "prepacked_"


class PackedLinear(nn.Module):
    """``y = x W^T + b`` with ``W [out, in]``, or ``W T`` of a transform, stored as the packed tensors of a format.

    The packed tensors are buffers under the names that ``format.packed_layout`` gives, so that the state dict of a
    loaded model is the checkpoint again. What a backend makes of them at load is kept beside them, out of the state
    dict; tensors that a backend uses as they are stay shared.

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
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.format = format
        self.format_name = format_name
        self.option = option
        self.dtype = dtype or torch.get_default_dtype()
        self.activation = activation
        self.transform = transform
        format.check(option, (out_features, in_features))
        if activation is not None:
            activation.check(in_features)
        if transform is not None:
            transform.check(in_features)
        layout = format.packed_layout(option, (out_features, in_features))
        for name, (shape, stored) in layout.items():
            self.register_buffer(name, torch.zeros(shape, dtype=stored))
        self.packed_names = tuple(layout)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=self.dtype)) if bias else None
        self.choice: Choice | None = None  # of select_backend
        self._requested: str | Mapping[str, Any] = "auto"
        self._installed: Mapping[str, Backend] | None = None
        self._spec = self._make_spec()
        self._reads: dict[str, str] = {}  # name that the backend reads -> attribute that holds it

    def packed(self) -> dict[str, Tensor]:
        """Return the tensors of the checkpoint by name."""
        return {name: self.get_buffer(name) for name in self.packed_names}

    def stored(self) -> Tensor:
        """Return the weight ``[out, in]`` in float32 that the packed tensors stand for, in the transform's basis."""
        shape = (self.out_features, self.in_features)
        return self.format.dequantize(self.format.unpack(self.packed(), self.option, shape), self.option)

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

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b`` for ``x [..., in]`` (float32, float16 or bfloat16), as ``[..., out]`` in its dtype."""
        if self.choice is None:
            raise AptqError(
                "This packed layer has no backend yet: load the model with from_pretrained or aptq.load, "
                "or call select_backend() after loading its tensors."
            )
        buffers = self._buffers  # get_buffer() takes as long as a small product
        tensors = {name: buffers[attribute] for name, attribute in self._reads.items()}
        if self.transform is not None:
            x = self.transform.apply(x)
        y = self.choice.backend.matmul(x, tensors, self._spec)  # type: ignore[arg-type]  # each is a tensor
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
            device=self.get_buffer(self.packed_names[0]).device,
            activation=self.activation,
        )

    def _clear_prepacked(self) -> None:
        for attribute in self._reads.values():
            if attribute.startswith(_PREPACKED):
                delattr(self, attribute)
        self._reads, self.choice = {}, None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move, but never cast, what the checkpoint holds: scales rounded to another dtype would be other weights."""
        packed = self.packed()
        device = self._spec.device
        cast = fn(torch.empty(0, dtype=self.dtype, device=self.get_buffer(self.packed_names[0]).device))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in packed.items():
            moved = self.get_buffer(name)
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        changed = cast.dtype != self.dtype or cast.device != device
        self.dtype = cast.dtype
        if changed and self.choice is not None and cast.device.type != "meta":
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
