"""A model that is its own student: layers that multiply with the original weights, or with rounded trained ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from aptq.api import (
    ActivationQuantizer,
    AptqError,
    Grid,
    Layer,
    Option,
    QuantizedWeight,
    RoundableFormat,
    Transform,
    format_of,
)
from aptq.models.experts import unfuse_experts
from aptq.models.structure import LinearLayer, find_blocks, find_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from aptq.api import ExportJob


class StudentLinear(nn.Module):
    """A linear layer of teacher and student, who share all of the model that is not quantized.

    The teacher multiplies with ``weight [out, in]`` as it was. The student multiplies with the trained weight ``master
    [out, in]`` (float32) rounded to the grid of the stored layer; gradients pass the rounding as if it were not there
    (straight-through). At first the student is the stored layer itself: a master is the original weight where that is
    rounded to the stored value, else the stored value, which is what error feedback made of it. With a transform,
    masters are in the basis that the layer is stored in.

    Args:
        weight: ``[out, in]``, the original; it is kept, not copied.
        bias: ``[out]``, or None.
        stored: the packed tensors of the layer.
        format: what they mean.
        option: bits and group size.
        activation: what quantizes the student's inputs; default: nothing.
        transform: the basis that the layer is stored in; default: the model's own.
    """

    weight: Tensor
    codes: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: nn.Parameter | None,
        stored: Mapping[str, Tensor],
        format: RoundableFormat,
        option: Option,
        activation: ActivationQuantizer | None = None,
        transform: Transform | None = None,
    ) -> None:
        super().__init__()
        self.format, self.option, self.activation, self.transform = format, option, activation, transform
        self.teaches = False
        shape = (weight.shape[0], weight.shape[1])
        quantized = format.unpack(stored, option, shape)
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.register_buffer("codes", quantized.codes, persistent=False)  # their shape and place; not updated
        for name, parameter in quantized.parameters.items():
            self.register_buffer(f"of_grid_{name}", parameter, persistent=False)
        self._names = tuple(quantized.parameters)
        self.bias = bias
        values = format.dequantize(quantized, option)
        original = weight.detach().float() if transform is None else transform.apply(weight.detach().float())
        rounded = self._round(original)[1]
        self.master = nn.Parameter(torch.where(rounded == values, original, values))

    def quantized(self) -> QuantizedWeight:
        """Return the student's codes as they are now, with the parameters of the stored layer."""
        return self._grid().finish(self._round(self.master.detach())[0])

    def packed(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores of the student, on the CPU."""
        return {name: tensor.cpu() for name, tensor in self.format.pack(self.quantized(), self.option).items()}

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b`` for ``x [..., in]``, as ``[..., out]``."""
        if self.teaches:
            return functional.linear(x, self.weight, self.bias)
        weight: Tensor = _StraightThrough.apply(self.master, lambda master: self._round(master)[1])  # type: ignore[no-untyped-call]
        x = x if self.transform is None else self.transform.apply(x)
        given = x if self.activation is None else self.activation.quantize(x)
        return functional.linear(given, weight.to(self.weight.dtype), self.bias)

    def _grid(self) -> Grid:
        parameters = {name: self.get_buffer(f"of_grid_{name}") for name in self._names}
        return self.format.grid(QuantizedWeight(codes=self.codes, parameters=parameters), self.option)

    def _round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes ``[1, in, ...]`` of a weight ``[out, in]`` on the stored grid, and values ``[out, in]``."""
        codes, values = self._grid().round(weight.T[None].contiguous(), slice(None))
        return codes, values[0].T


class _StraightThrough(torch.autograd.Function):
    """A function of one tensor whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``function(value)``."""
        return function(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
        """Hand the gradient on."""
        return gradients[0], None


def enroll(
    model: PreTrainedModel,
    job: ExportJob,
    activation: ActivationQuantizer | None = None,
    transform: Transform | None = None,
) -> dict[str, StudentLinear]:
    """Put student layers in the places of a full-precision model's layers, and freeze all but their masters.

    Args:
        model: the original; it is changed.
        job: the finished quantization: plan, format and packed tensors.
        activation: what quantizes the layers' inputs.
        transform: the basis that the layers are stored in.

    Returns:
        the new layers by name, in the order of the plan.

    Raises:
        AptqError: the model lacks a layer of the plan, or a format cannot be trained in.
    """
    model.requires_grad_(False)
    originals = _layers_of(model, list(job.plan))
    students = {}
    for name, option in job.plan.items():
        layer, format = originals[name], trainable_format(job, option)
        bias = getattr(layer.module, "bias", None)
        students[name] = StudentLinear(layer.weight(), bias, job.packed(name), format, option, activation, transform)
        model.set_submodule(name, students[name])
    return students


def trainable_format(job: ExportJob, option: Option) -> RoundableFormat:
    """Return the format that a layer of a run is stored in; raise ``AptqError`` when nothing can be rounded to it."""
    format = format_of(job.format, option)
    if not isinstance(format, RoundableFormat):
        raise AptqError(
            f"Layers in format {option.format or job.format_config['name']} cannot be trained: it does not give back "
            "the grid of a stored weight (aptq.api.RoundableFormat). Formats such as integer, float, asymmetric_float "
            "and scaled do."
        )
    return format


@contextmanager
def teaching(students: Mapping[str, StudentLinear]) -> Iterator[None]:
    """Let the layers multiply with the original weights while the context lasts."""
    for layer in students.values():
        layer.teaches = True
    try:
        yield
    finally:
        for layer in students.values():
            layer.teaches = False


def _layers_of(model: PreTrainedModel, names: list[str]) -> dict[str, Layer]:
    """Return layers of a model by name, those of experts and of the head too."""
    modules = dict(model.named_modules())
    if any(name not in modules for name in names):
        unfuse_experts(model)
        modules = dict(model.named_modules())
    found = {
        name: layer for block, each in find_blocks(model).items() for name, layer in find_layers(each, block).items()
    }
    found |= {
        name: LinearLayer(name, module)
        for name in names
        if name not in found and isinstance(module := modules.get(name), nn.Linear)  # the head
    }
    lost = [name for name in names if name not in found]
    if lost:
        raise AptqError(f"The model has no layer {lost[0]}, which the run's plan names; is model.path still the same?")
    return found
