"""The backend that is bitsandbytes' 4-bit product, where that package is installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from aptq import packing
from aptq.api import LayerSpec
from aptq.backends.planar import FLOATS, refuses_dtype, refuses_groups, unreadable
from aptq.meaning import Levels, meaning_of

_DTYPES = {"cpu": FLOATS, "cuda": (torch.float16, torch.bfloat16)}
_BLOCKS = (32, 64, 128, 256, 512, 1024)  # with longer ones its kernels for AVX-512 are known to lose digits
_KINDS = ("nf4", "fp4")
_SAME = 1e-6  # of the largest level: what levels may differ by, far below any rounding of activations


@dataclass(frozen=True)
class Bitsandbytes:
    """Multiply levels of 4 bits by bitsandbytes' ``gemm_4bit``.

    It has two tables of levels, NF4 and an FP4 of its own, whose smallest magnitude is 1/192 of the largest and not
    e2m1's 1/12. A format runs here whose levels are all in one of them, in whatever order; others are refused, FP4 as
    ``format=float`` has it among them. Weights are rounded to the dtype of the activations, as ``reference`` rounds
    them. On a CPU the weight is unpacked at each call.

    Source: Dettmers et al., "QLoRA" (NeurIPS 2023); bitsandbytes 0.50.
    """

    @property
    def priority(self) -> int:
        """Behind our own kernels and torch's, before ``reference``."""
        return 20

    def refuses(self, spec: LayerSpec) -> str | None:
        """Refuse other devices, dtypes, bits, groups and levels, and machines without bitsandbytes."""
        if spec.device.type not in _DTYPES:
            return f"it runs on the CPU and on CUDA devices, not on {spec.device.type}"
        if (reason := refuses_dtype(spec, _DTYPES[spec.device.type])) is not None:
            return reason
        if spec.option.bits != 4:
            return f"it takes codes of 4 bits, not {spec.option.bits}"
        if (reason := refuses_groups(spec, _BLOCKS) or unreadable(spec)) is not None:
            return reason
        meaning = meaning_of(spec.format, spec.option)
        if not isinstance(meaning, Levels) or meaning.two_sided:
            return f"it takes levels with one scale, which format {spec.format_name} has not"
        if find_spec("bitsandbytes") is None:
            return "bitsandbytes is not installed; pip install 'aptq[bitsandbytes]'"
        try:
            tables = _tables()
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            return f"the bitsandbytes that is installed cannot be used, 0.50 or newer is needed: {error}"
        if _codes_in(meaning.levels, tables) is None:
            return f"the levels of format {spec.format_name} are not those of bitsandbytes' NF4 or FP4"
        return None

    def prepack(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Return the codes of its table, two a byte ``[out * in / 2, 1]``, and float32 scales ``[out * groups]``."""
        meaning = meaning_of(spec.format, spec.option)
        assert isinstance(meaning, Levels)  # others are refused
        found = _codes_in(meaning.levels, _tables())
        assert found is not None
        kind, theirs = found
        codes = theirs.to(spec.device)[packing.unpack(tensors["qweight"], 4, spec.in_features).int()]
        scales = tensors["scales"].float() * float(meaning.levels.abs().max())
        packed = codes[:, ::2] << 4 | codes[:, 1::2]
        return {kind: packed.reshape(-1, 1), "scales": scales.T.reshape(-1)}

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """Return ``x @ W^T`` for ``x [..., in]``, as ``[..., out]`` in the dtype of ``x``."""
        shape = (spec.out_features, spec.in_features)
        if x.numel() == 0:  # its kernels for GPUs do not ask
            return x.new_empty(*x.shape[:-1], spec.out_features)
        kind = next(kind for kind in _KINDS if kind in tensors)
        rows = x.reshape(-1, spec.in_features)
        y: Tensor = torch.ops.bitsandbytes.gemm_4bit(
            rows, tensors[kind], shape, tensors["scales"], spec.option.group_width(spec.in_features), kind
        )
        return y.view(*x.shape[:-1], spec.out_features)


@cache
def _tables() -> dict[str, Tensor]:
    """Return bitsandbytes' levels, float32 ``[16]`` each; it is imported here, which takes seconds.

    Raises:
        ImportError, OSError, RuntimeError, AttributeError: it cannot be imported, or has no ``gemm_4bit``.
    """
    functional = import_module("bitsandbytes.functional")
    _ = torch.ops.bitsandbytes.gemm_4bit
    return {kind: functional.get_4bit_type(kind, device="cpu") for kind in _KINDS}


def _codes_in(levels: Tensor, tables: Mapping[str, Tensor]) -> tuple[str, Tensor] | None:
    """Return a table that has all levels, and which of its codes (uint8) each of them is there; or None."""
    wanted = levels / levels.abs().max()
    for kind, table in tables.items():
        distance, codes = (wanted[:, None] - table).abs().min(dim=1)
        if distance.max() <= _SAME:
            return kind, codes.to(torch.uint8)
    return None
