"""What backends that are operators of torch itself ask: whether it is there, and whether codes are integers."""

from __future__ import annotations

import torch

from aptq.api import LayerSpec
from aptq.backends.planar import refuses_dtype, refuses_levels


def refuses_operator(spec: LayerSpec, name: str) -> str | None:
    """Refuse devices other than CPUs and GPUs, and those for which this torch lacks an operator of ``aten``."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(spec.device.type)
    if key is None:
        return f"it runs on the CPU and on CUDA devices, not on {spec.device.type}"
    if hasattr(torch.ops.aten, name) and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
        return None
    return f"torch {torch.__version__} has no {name} for {spec.device.type}"


def refuses_integers(spec: LayerSpec, bits: int) -> str | None:
    """Refuse activations that are not bfloat16, and codes that are no integers of a width."""
    if (reason := refuses_dtype(spec, [torch.bfloat16])) is not None:
        return reason
    if spec.option.bits != bits:
        return f"it takes integers of {bits} bits, not codes of {spec.option.bits}"
    return refuses_levels(spec)
