"""The backend for x86 CPUs: C++ that reads the packed codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from aptq import packing
from aptq.api import AptqError, LayerSpec
from aptq.backends.planar import FLOATS, refuses_dtype, unreadable
from aptq.kernels.cpu import ARCHITECTURES, FOLDER, load_kernels, table_of_states
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

    def prepack(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Return the checkpoint's own tensors, and the table of levels or states where the format has one."""
        meaning = meaning_of(spec.format, spec.option)
        if isinstance(meaning, States):
            return {**tensors, "states": _shared_table(meaning, spec.option.bits)}
        if not isinstance(meaning, Levels):
            return dict(tensors)
        table = torch.zeros(16)
        table[: len(meaning.levels)] = meaning.levels
        return {**tensors, "levels": table}

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """Return ``x @ W^T`` for ``x [..., in]``, as ``[..., out]`` in the dtype of ``x``."""
        if "states" in tensors:
            return self._matmul_states(x, tensors, _group(spec))
        y: Tensor = torch.ops.aptq.cpu_matmul(
            x,
            tensors["qweight"],
            tensors["scales"],
            tensors.get("scales_below"),
            tensors.get("qzeros"),
            tensors.get("levels"),
            _group(spec),
            self.activations == "int8",
            self.architecture,
            self.cache_dir,
        )
        return y

    def _matmul_states(self, x: Tensor, tensors: Mapping[str, Tensor], group: int) -> Tensor:
        packed = tensors["qweight"], tensors["scales"], tensors["states"]
        y: Tensor = torch.ops.aptq.cpu_trellis_matmul(x, *packed, group, self.architecture, self.cache_dir)
        return y


@lru_cache(maxsize=64)
def _shared_table(meaning: States, bits: int) -> Tensor:
    """Return one table for all layers of a kind, which the cache then holds once."""
    return table_of_states(meaning.values, bits)


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
