"""Do quantizers and backends keep their promises on weights that a format stores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from aptq.api import (
    Backend,
    Curvature,
    DraftQuantizer,
    DriftQuantizer,
    Factors,
    Format,
    LayerSpec,
    Option,
    QuantizedWeight,
    Quantizer,
    Rounded,
    Transform,
    transforms_inputs,
)
from aptq.testing.assertions import (
    Shape,
    accepted,
    accepts_heads,
    default_format,
    expect,
    expect_equal,
    expect_same_levels,
    expect_same_tensors,
    random_curvature,
    random_weight,
)

__all__ = ["check_backend", "check_quantizer"]


# --------------------------------------------------------------------------------------------------- quantizers


def check_quantizer(
    quantizer: Quantizer,
    *,
    format: Format | None = None,
    bits: Sequence[int] = (2, 4),
    shapes: Sequence[Shape] = ((8, 48), (5, 33)),
) -> None:
    """Check a quantizer on well-posed, rank-deficient and zero curvatures, with one head and with several.

    Raises:
        AssertionError: a promise of ``aptq.api.Quantizer`` is broken.
    """
    format = format or default_format()
    for option, shape in accepted(format, bits, (16,), shapes):
        for heads in (1, 2):
            if shape[0] % heads == 0 and accepts_heads(format, option, shape, heads):
                for what, column in _curvatures(heads, shape[1]).items():
                    case = f"{option}, shape {shape}, {heads} heads, {what} curvature"
                    _check_quantizer_case(quantizer, format, option, shape, Curvature(column=column, tokens=64), case)
                    if isinstance(quantizer, DriftQuantizer) and quantizer.needs_drift:
                        _check_drift_case(quantizer, format, option, shape, column, case)


def _curvatures(heads: int, width: int) -> dict[str, Tensor]:
    dead = random_curvature(heads, width, seed=3)
    dead[:, 0, :] = 0
    dead[:, :, 0] = 0
    return {
        "well-posed": random_curvature(heads, width, seed=1),
        "rank-deficient": random_curvature(heads, width, seed=2, rank=max(1, width // 4)),
        "partly zero": dead,
        "zero": torch.zeros(heads, width, width),
    }


def _check_quantizer_case(
    quantizer: Quantizer, format: Format, option: Option, shape: Shape, curvature: Curvature, case: str
) -> None:
    quantize = partial(_quantize, quantizer, format, option, curvature.heads, case)
    column = curvature.column.clone()
    factors = quantizer.prepare(curvature)
    expect_equal(curvature.column, column, f"{case}: prepare() changed the curvature")
    _check_health(factors, case)
    first, second = (random_weight(1, shape, seed=seed)[0] for seed in (5, 6))
    quantized = quantize(first, factors)
    shared = quantize(second, factors)
    alone = quantize(second, quantizer.prepare(curvature))
    expect_equal(shared.codes, alone.codes, f"{case}: codes with factors that another layer used before")
    expect_same_tensors(shared.parameters, alone.parameters, f"{case}: parameters with factors used before")
    restored = format.dequantize(quantized, option)
    expect(bool(restored.isfinite().all()), f"{case}: the quantized weight has NaN or Inf.")
    error, everything = curvature.quadratic(restored - first), curvature.quadratic(first)
    expect(
        error <= everything or everything == 0,
        f"{case}: the quantized weight is worse than zeros: error {error:.4g} against {everything:.4g}.",
    )
    if isinstance(quantizer, DraftQuantizer):
        own = quantizer.draft
        draft = _quantize(own, format, option, curvature.heads, f"{case}, draft", first, factors)
        alike = _quantize(own, format, option, curvature.heads, f"{case}, draft", first, own.prepare(curvature))
        expect_equal(draft.codes, alike.codes, f"{case}: the draft's codes with the quantizer's factors")
    packed = format.pack(quantized, option)
    unpacked = format.unpack(packed, option, shape)
    expect_equal(format.dequantize(unpacked, option), restored, f"{case}: the weight after pack() and unpack()")
    half = quantize(first.bfloat16(), factors)
    expect(half.codes.shape == quantized.codes.shape, f"{case}: a bfloat16 weight gives codes of another shape.")


def _check_drift_case(
    quantizer: Quantizer, format: Format, option: Option, shape: Shape, column: Tensor, case: str
) -> None:
    """No drift is drift of zero, and some is read and left alone."""
    weight = random_weight(1, shape, seed=5)[0]
    none, still, moved = (
        Curvature(column=column, tokens=64, drift=drift) for drift in (None, torch.zeros_like(column), 0.1 * column)
    )
    results = []
    for curvature in (none, still, moved):
        factors = quantizer.prepare(curvature)
        quantized = _quantize(quantizer, format, option, column.shape[0], f"{case}, with drift", weight, factors)
        results.append(format.dequantize(quantized, option))
    expect_equal(results[1], results[0], f"{case}: the weight with a drift of zero")
    expect(bool(results[2].isfinite().all()), f"{case}: the weight quantized with drift has NaN or Inf.")
    assert moved.drift is not None
    expect_equal(moved.drift, 0.1 * column, f"{case}: prepare() changed the drift")


def _check_health(factors: Factors, case: str) -> None:
    expect(
        isinstance(factors.damping, float | int) and factors.damping >= 0,
        f"{case}: damping is {factors.damping!r}; a share of the mean diagonal, 0 or more, is promised.",
    )
    expect(
        isinstance(factors.events, tuple) and all(isinstance(event, str) for event in factors.events),
        f"{case}: events are {factors.events!r}; a tuple of texts is promised.",
    )


def _quantize(
    quantizer: Quantizer, format: Format, option: Option, heads: int, case: str, weight: Tensor, factors: Factors
) -> QuantizedWeight:
    before = weight.clone()
    rounded = quantizer.quantize(weight, factors, format, option)
    expect_equal(weight, before, f"{case}: quantize() changed the weight")
    expect(isinstance(rounded, Rounded), f"{case}: quantize() gave {type(rounded).__name__}; api.Rounded is promised.")
    values = format.dequantize(rounded.weight, option)
    columns = values.reshape(heads, -1, values.shape[-1]).transpose(1, 2)
    again = rounded.grid.round(columns, slice(None))[1].transpose(1, 2).reshape(values.shape)
    expect_same_levels(
        rounded.grid, again, values, f"{case}: rounding the result once more on the grid that came with it"
    )
    return rounded.weight


# ----------------------------------------------------------------------------------------------------- backends

TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest allowed ``|y - y_exact| / (|x| |W|)^T`` by dtype of the activations."""


def check_backend(
    backend: Backend,
    *,
    format: Format | None = None,
    format_name: str = "integer",
    bits: Sequence[int] = (2, 3, 4, 8),
    shapes: Sequence[Shape] = ((64, 128), (24, 40), (5, 33)),
    group_sizes: Sequence[int] = (32, 64),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
    device: torch.device | str = "cpu",
    transform: Transform | None = None,
) -> None:
    """Check a backend against ``x @ dequantize(W)^T`` in float64, for every layer that it does not refuse.

    With a transform, a ``TransformBackend`` has to apply it, and the others are given inputs that have it.

    Raises:
        AssertionError: a product is wrong, tensors of the checkpoint were changed, or every layer was refused.
    """
    format = format or default_format()
    expect(isinstance(backend.priority, int), f"priority is {backend.priority!r}; a whole number is promised.")
    reasons = []
    for option, shape in accepted(format, bits, group_sizes, shapes):
        for dtype in dtypes:
            spec = LayerSpec(
                out_features=shape[0],
                in_features=shape[1],
                format=format,
                format_name=format_name,
                option=option,
                dtype=dtype,
                device=torch.device(device),
                transform=transform,
            )
            reason = backend.refuses(spec)
            expect(
                reason is None or bool(reason), f"{option}: refuses() gives {reason!r}; a reason or None is promised."
            )
            if reason is None:
                _check_product(backend, spec)
            reasons.append(reason)
    expect(
        None in reasons, f"The backend refuses every layer that was tried: {sorted({str(each) for each in reasons})}."
    )


def _check_product(backend: Backend, spec: LayerSpec) -> None:
    shape = (spec.out_features, spec.in_features)
    case = f"{spec.option}, shape {shape}, {spec.dtype} on {spec.device}"
    weight = random_weight(1, shape, seed=7)
    grid = spec.format.fit(weight, spec.option)
    quantized = grid.finish(grid.round(weight.transpose(1, 2), slice(None))[0])
    exact = spec.format.dequantize(quantized, spec.option).double()
    stored = {name: tensor.to(spec.device) for name, tensor in spec.format.pack(quantized, spec.option).items()}
    before = {name: tensor.clone() for name, tensor in stored.items()}
    tensors = backend.prepack(stored, spec)
    generator = torch.Generator().manual_seed(11)
    for size in ((), (1,), (0,), (17,), (2, 3)):
        x = torch.randn(*size, spec.in_features, generator=generator).to(spec.dtype).to(spec.device)
        wide = x.double().cpu()
        if spec.transform is not None:
            wide = spec.transform.apply(wide)
            x = x if transforms_inputs(backend, spec) else spec.transform.apply(x)
        given = x.clone()
        product = backend.matmul(x, tensors, spec)
        expect(
            product.shape == (*size, spec.out_features) and product.dtype == spec.dtype,
            f"{case}: matmul() gives {tuple(product.shape)} {product.dtype} for x {tuple(x.shape)} {x.dtype}.",
        )
        expect_equal(x, given, f"{case}: matmul() changed x")
        error = (product.double().cpu() - wide @ exact.T).abs() / (wide.abs() @ exact.abs().T).clamp(min=1e-30)
        worst = float(error.max()) if error.numel() else 0.0
        expect(
            worst <= TOLERANCES[spec.dtype],
            f"{case}: matmul() of x {tuple(x.shape)} is off by {worst:.3g}; {TOLERANCES[spec.dtype]} is allowed.",
        )
    expect_same_tensors(stored, before, f"{case}: prepack() or matmul() changed the checkpoint's tensors")
