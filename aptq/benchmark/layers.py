"""Layers to time: a random weight in a format, as a backend holds it, in as many copies as a cache cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from aptq.api import Backend, Format, LayerSpec, Option
from aptq.large_pages import LargePages

ROTATED = 128 << 20
"""Bytes of weights that are read before one is read again: more than caches hold, as in a model's forward pass."""
_MOST_COPIES = 256


@dataclass(frozen=True, eq=False, kw_only=True)
class Weight:
    """A random weight as a format stores it."""

    format: Format
    option: Option
    packed: dict[str, Tensor]  # on the device
    dense: Tensor  # [out, in] float32 on the device: what the codes stand for

    @property
    def num_bytes(self) -> int:
        """Size of the packed tensors."""
        return sum(tensor.nbytes for tensor in self.packed.values())

    def spec(self, dtype: torch.dtype) -> LayerSpec:
        """Return what a backend is asked about."""
        out_features, in_features = self.dense.shape
        return LayerSpec(
            out_features=out_features,
            in_features=in_features,
            format=self.format,
            format_name=self.option.format,
            option=self.option,
            dtype=dtype,
            device=self.dense.device,
        )


def random_weight(format: Format, option: Option, shape: tuple[int, int], device: torch.device, seed: int) -> Weight:
    """Round a random weight ``[out, in]`` to the nearest codes.

    Raises:
        AptqError: the format cannot store a layer of this shape at this option.
    """
    format.check(option, shape)
    weight = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5
    grid = format.fit(weight, option)
    quantized = grid.finish(grid.round(weight.transpose(1, 2), slice(None))[0])
    packed = {name: tensor.to(device) for name, tensor in format.pack(quantized, option).items()}
    dense = format.dequantize(quantized, option).contiguous().to(device)
    return Weight(format=format, option=option, packed=packed, dense=dense)


def packed_calls(backend: Backend, weight: Weight, x: Tensor) -> list[Callable[[], Tensor]]:
    """Return the products of ``x [rows, in]`` with copies of a packed weight."""
    spec = weight.spec(x.dtype)

    def call(tensors: dict[str, Tensor]) -> Callable[[], Tensor]:
        return lambda: backend.matmul(x, tensors, spec)

    first = backend.prepack(weight.packed, spec)
    size = max(1, sum(tensor.nbytes for tensor in first.values()))
    return [call(copy) for copy in _copied(first, _copies(size))]


def dense_calls(weight: Weight, x: Tensor) -> list[Callable[[], Tensor]]:
    """Return the products of ``x [rows, in]`` with copies of the dense weight in its dtype."""
    first = weight.dense.to(x.dtype)

    def call(dense: Tensor) -> Callable[[], Tensor]:
        return lambda: functional.linear(x, dense)

    return [call(copy["dense"]) for copy in _copied({"dense": first}, _copies(first.nbytes))]


def _copied(tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Return copies; on the CPU in the memory that packed weights of a loaded model have, dense ones as well."""
    if any(tensor.device.type != "cpu" for tensor in tensors.values()):
        return [{name: tensor.clone() for name, tensor in tensors.items()} for _ in range(count)]
    memory = LargePages(tensor.nbytes for _ in range(count) for tensor in tensors.values())
    return [{name: memory.copy(tensor) for name, tensor in tensors.items()} for _ in range(count)]


def _copies(num_bytes: int) -> int:
    return min(_MOST_COPIES, max(2, -(-ROTATED // num_bytes)))
