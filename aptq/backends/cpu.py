"""The backend for x86 CPUs: C++ that reads the packed codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from aptq import packing
from aptq.api import AptqError, LayerSpec, RotationTransform
from aptq.backends.planar import FLOATS, refuses_dtype, unreadable
from aptq.kernels.cpu import ARCHITECTURES, FOLDER, load_kernels, ops, read_states
from aptq.kernels.operators import plain
from aptq.meaning import Integers, Levels, States, meaning_of

_UNIT = packing.UNIT


@dataclass(frozen=True)
class Cpu:
    """Multiply by the codes themselves, with AVX2 or AVX-512.

    Activations become fixed-point numbers within each run of at most 128 inputs: of 24 bits from float32, of 16 bits
    from half precision, so that all sums are exact integers and the result is as good as the dtype. With
    ``activations="int8"`` they have 8 bits, which is faster and off by about a percent. A row with NaN or infinity
    gives NaN. Where codes are not integers, sums are float32.

    The kernels are built with the system's compiler when the first layer asks for them, and kept in ``cache_dir``.
    ``architecture="native"`` uses all that the CPU has, ``x86-64-v3`` AVX2, ``x86-64-v4`` AVX-512 without VNNI.

    Raises:
        AptqError: an option has a value that it cannot have.
    """

    activations: Literal["exact", "int8"] = "exact"
    architecture: str = "native"
    cache_dir: str = FOLDER

    def __post_init__(self) -> None:
        if self.activations not in ("exact", "int8"):
            raise AptqError(f"backend.activations={self.activations!r} is not known; use exact or int8.")
        if self.architecture not in ARCHITECTURES:
            allowed = ", ".join(ARCHITECTURES)
            raise AptqError(f"backend.architecture={self.architecture!r} is not known; use one of {allowed}.")

    @property
    def priority(self) -> int:
        """Before ``reference``."""
        return 50

    def refuses(self, spec: LayerSpec) -> str | None:
        """Refuse other devices, dtypes, group sizes and formats, and machines where the kernels cannot be built."""
        if spec.device.type != "cpu":
            return f"it runs on the CPU, not on {spec.device.type}"
        if (reason := refuses_dtype(spec, FLOATS) or _refuses_layout(spec)) is not None:
            return reason
        try:
            load_kernels(self.architecture, self.cache_dir)
        except AptqError as error:
            return str(error)
        return None

    def transforms(self, spec: LayerSpec) -> bool:
        """Rotate the inputs where the transform is a rotation."""
        return isinstance(spec.transform, RotationTransform)

    def prepack(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Return the checkpoint's own tensors, with the table of levels or states where the format has one, and the
        rotation of the inputs where there is one; layers of a kind share both."""
        read = dict(tensors)
        meaning = meaning_of(spec.format, spec.option)
        if isinstance(meaning, States):
            read["states"] = _read_states(meaning)
        elif isinstance(meaning, Levels):
            table = torch.zeros(16)
            table[: len(meaning.levels)] = meaning.levels
            read["levels"] = table
        if isinstance(spec.transform, RotationTransform):
            rotation = spec.transform.rotation(spec.in_features)
            read |= {"signs": rotation.signs, "matrix": rotation.matrix}
        return read

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """Return ``x @ W^T``, or ``x T @ W^T``, for ``x [..., in]``, as ``[..., out]`` in the dtype of ``x``."""
        operators = ops if x.is_cpu and plain(x) else torch.ops.aptq
        held, turn = tensors.get, (tensors.get("signs"), tensors.get("matrix"))
        codes, build, group = (tensors["qweight"], tensors["scales"]), (self.architecture, self.cache_dir), _group(spec)
        y: Tensor
        if (states := held("states")) is not None:
            y = operators.cpu_trellis_matmul(x, *codes, states, *turn, group, *build)
        else:
            values = held("scales_below"), held("qzeros"), held("levels")
            y = operators.cpu_matmul(x, *codes, *values, *turn, group, self.activations == "int8", *build)
        return y


@lru_cache(maxsize=64)
def _read_states(meaning: States) -> Tensor:
    """Return what is read of states, one tensor for all layers of a kind."""
    return read_states(meaning.values)


def _group(spec: LayerSpec) -> int:
    """Return the inputs that share a scale, a multiple of a unit: nothing lies behind the end of a row."""
    size = spec.option.group_size
    return -(-spec.in_features // _UNIT) * _UNIT if size == -1 or size >= spec.in_features else size


def _refuses_layout(spec: LayerSpec) -> str | None:
    """Say what of the format's codes or tensors the kernels cannot read."""
    bits, size = spec.option.bits, spec.option.group_size
    if _group(spec) % _UNIT:
        return f"it takes groups of a multiple of {_UNIT} inputs and whole rows, not of {size}"
    if (reason := unreadable(spec, states=True)) is not None:
        return reason
    meaning = meaning_of(spec.format, spec.option)
    if isinstance(meaning, States):
        return f"it reads states of codes of at most 6 bits, not {bits}" if bits > 6 else None
    if not 2 <= bits <= 4 and not isinstance(meaning, Integers):
        return f"it reads levels of 2 to 4 bits, not {bits}"
    return None
