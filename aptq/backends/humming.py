"""The backend that is humming's kernels for NVIDIA GPUs, where that package is installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from aptq import packing
from aptq.api import AptqError, LayerSpec
from aptq.backends.planar import refuses_dtype, refuses_groups, refuses_levels

_DTYPES = (torch.float16, torch.bfloat16)
_CAPABILITY = {torch.float16: (7, 5), torch.bfloat16: (8, 0)}  # of the oldest GPUs that it is written for
_MULTIPLE = 64  # of outputs and of inputs: its weights are tiles of 64 outputs
_GROUPS = (32, 64, 128, 256, 512)
_LOCKS = 2048  # entries, by which its blocks that share an output wait for each other; not shared by layers
_ERROR = 2**-6  # of a product's norm: more is not rounding


@dataclass(frozen=True)
class Humming:
    """Multiply integers of 2 to 8 bits by humming's ``humming_gemm``.

    It is compiled for each kind of layer when the first one is loaded (NVRTC or nvcc), and knows weights as ``(code -
    zero) * scale`` with the scale in the dtype of the activations: those stored otherwise are rounded. Every layer is
    multiplied once at load and held against its own weights, so that a layer that the installed release reads
    otherwise is an error and not another model.

    Source: the package ``humming-kernels`` 0.1.20.
    """

    @property
    def priority(self) -> int:
        """Behind our own kernels and torch's, before ``reference``."""
        return 25

    def refuses(self, spec: LayerSpec) -> str | None:
        """Refuse other devices, dtypes, bits, groups and codes, and machines without humming."""
        if spec.device.type != "cuda":
            return f"it runs on CUDA devices, not on {spec.device.type}"
        if (reason := self.refuses_layer(spec)) is not None:
            return reason
        if find_spec("humming") is None:
            return "humming is not installed; pip install 'aptq[humming]'"
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is not built for NVIDIA GPUs"
        needed, found = _CAPABILITY[spec.dtype], torch.cuda.get_device_capability(spec.device)
        if found < needed:
            told, has = (".".join(map(str, each)) for each in (needed, found))
            return f"in {str(spec.dtype).removeprefix('torch.')} it needs compute capability {told}, and this has {has}"
        try:
            _modules()
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            return f"the humming that is installed cannot be used, 0.1.20 or newer is needed: {error}"
        return None

    def refuses_layer(self, spec: LayerSpec) -> str | None:
        """Say what of a layer the kernels do not take, on whatever device."""
        if (reason := refuses_dtype(spec, _DTYPES)) is not None:
            return reason
        if not 2 <= spec.option.bits <= 8:
            return f"it takes codes of 2 to 8 bits, not {spec.option.bits}"
        if (reason := refuses_levels(spec)) is not None:
            return reason
        if spec.out_features % _MULTIPLE or spec.in_features % _MULTIPLE:
            shape = f"{spec.out_features} outputs of {spec.in_features} inputs"
            return f"it takes multiples of {_MULTIPLE} outputs and inputs, not {shape}"
        return None if _width(spec) == 0 else refuses_groups(spec, _GROUPS)

    def prepack(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Return the weight in humming's order, its scales and zeros, and the locks of its kernels.

        Raises:
            AptqError: a product is not that of the layer's weights.
        """
        transform = _modules()["transform"].transform_humming_tensors
        read: dict[str, Tensor] = transform(_config(spec), unordered(tensors, spec))
        read["locks"] = torch.zeros(_LOCKS, dtype=torch.int32, device=spec.device)
        stored = spec.format.dequantize(spec.format.unpack(tensors, spec.option, _shape(spec)), spec.option)
        x = torch.randn(3, spec.in_features, generator=torch.Generator().manual_seed(0)).to(spec.device, spec.dtype)
        expected = x.float() @ stored.float().T
        error = float((self.matmul(x, read, spec).float() - expected).norm() / expected.norm())
        if not error <= _ERROR:
            layer = f"a layer {list(_shape(spec))} of {spec.option.bits} bits"
            raise AptqError(
                f"humming multiplies {layer} wrongly, by {error:.1%} of the product's norm; load the model with "
                "another backend, and please report it."
            )
        return read

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """Return ``x @ W^T`` for ``x [..., in]``, as ``[..., out]`` in the dtype of ``x``."""
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], spec.out_features)
        y: Tensor = _modules()["forward"].humming_forward(
            _config(spec),
            x.reshape(-1, spec.in_features).contiguous(),
            tensors["weight"],
            tensors["weight_scale"],
            tensors.get("zero_point"),
            locks=tensors["locks"],
        )
        return y.view(*x.shape[:-1], spec.out_features)


def unordered(tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
    """Return a layer as humming's checkpoints have it.

    Codes are int32 ``[out, in * bits / 32]``, a row's codes one after the other from the lowest bit on; scales are
    ``[out, groups]``, and zeros, which symmetric integers have none of, ``[out * bits / 32, groups]``, likewise along
    the outputs.
    """
    bits = spec.option.bits
    read = {
        "weight": stream(packing.unpack(tensors["qweight"], bits, spec.in_features), bits),
        "weight_scale": tensors["scales"].T.to(spec.dtype).contiguous(),
    }
    if "qzeros" in tensors:
        zeros = packing.unpack(tensors["qzeros"], bits, spec.out_features)
        read["zero_point"] = stream(zeros, bits).T.contiguous()
    return read


def stream(codes: Tensor, bits: int) -> Tensor:
    """Return codes ``[rows, n]`` one after the other from the lowest bit on, int32 ``[rows, n * bits / 32]``."""
    places = torch.arange(8, device=codes.device, dtype=torch.uint8)
    ones = (codes.to(torch.uint8).unsqueeze(-1) >> places[:bits]) & 1
    return (ones.reshape(len(codes), -1, 8) << places).sum(-1, dtype=torch.uint8).view(torch.int32)


def schema_of(spec: LayerSpec) -> Any:
    """Return what a layer's tensors are, in humming's words."""
    return _modules()["schema"].HummingWeightSchema(
        b_dtype=f"uint{spec.option.bits}",
        weight_scale_group_size=_width(spec),
        has_zero_point="qzeros" in spec.format.packed_layout(spec.option, _shape(spec)),
    )


@lru_cache(maxsize=4096)
def _config(spec: LayerSpec) -> Any:
    prepare = _modules()["transform"].prepare_layer_config
    return prepare(spec.out_features, spec.in_features, schema_of(spec), torch_dtype=spec.dtype, device=spec.device)


@cache
def _modules() -> dict[str, Any]:
    """Return what is used of humming, which is imported here, once."""
    return {name: import_module(f"humming.{name}") for name in ("schema", "transform", "forward")}


def _shape(spec: LayerSpec) -> tuple[int, int]:
    return spec.out_features, spec.in_features


def _width(spec: LayerSpec) -> int:
    """Return the inputs of a group, 0 for whole rows, as humming has it."""
    width = spec.option.group_width(spec.in_features)
    return 0 if width == spec.in_features else width
