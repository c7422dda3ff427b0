"""Trellis-coded quantization: a weight's code and those of the outputs before it choose its value together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aptq import packing
from aptq.api import AptqError, Option, QuantizedWeight
from aptq.formats.grouped import GroupedGrid, check_group, split_groups
from aptq.formats.scales import FLOATS, pack_scales, read_scales, scale_layout, stored_scale
from aptq.formats.trellis_code import BITS, STATE_BITS, best_codes, best_scale, states_of, values_of_states


@dataclass(frozen=True)
class Trellis:
    """``w_ij = scale_i value[state_ij]``; the state is made of the codes of output ``i`` and of those before it.

    A column ``j`` of weights (all outputs of one input) is one run of codes of 1 to 6 bits, rounded as a whole by the
    Viterbi algorithm (``aptq.formats.trellis_code``), so that every quantizer that feeds errors from column to column
    serves it. Nothing is stored but the codes, exactly ``bits`` a weight, and the scales: one for ``group_size`` inputs
    of each output, by default for all of them. Its values are those of a normal distribution: it is meant for
    weights in another basis (``transform=hadamard``).

    ``state_bits`` is how much a value depends on: 10, or 12 for a little less error at four times the work.

    Source: Tseng et al., "QTIP: Quantization with Trellises and Incoherence Processing" (NeurIPS 2024), there with
    states of 16 bits and runs of 256 weights that bite their tails; the code is ours (``trellis_code``).
    """

    group_size: int = -1
    state_bits: int = 10
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.scale_dtype not in FLOATS:
            raise AptqError(f"format.scale_dtype={self.scale_dtype!r} is not known; use one of {', '.join(FLOATS)}.")
        if self.state_bits not in STATE_BITS:
            allowed = " or ".join(map(str, STATE_BITS))
            raise AptqError(f"format.state_bits={self.state_bits} is not allowed; use {allowed}.")
        check_group(Option(bits=2, group_size=self.group_size))

    @property
    def gains_by_transforms(self) -> bool:
        """True: weights in another basis are close to normal, as the code has it."""
        return True

    def check(self, option: Option, shape: tuple[int, int]) -> None:
        """Raise ``AptqError`` for bits outside 1-6 or a meaningless group size; every shape is served."""
        del shape
        if option.bits not in BITS:
            raise AptqError(f"Format trellis has codes of {BITS[0]} to {BITS[-1]} bits; got bits={option.bits}.")
        check_group(option)

    def fit(self, weight: Tensor, option: Option, importance: Tensor | None = None) -> TrellisGrid:
        """Fit scales to a weight ``[1, rows, in]``: the root mean square of each group, times the best for the code.

        Raises:
            AptqError: several heads, whose columns are rounded in orders of their own; a scale that is not finite.
        """
        del importance  # all of a column has the same, and scales are of rows
        if len(weight) > 1:
            raise AptqError(
                "Format trellis codes all outputs of an input as one run, and cannot round heads by themselves; use a "
                "Hessian without heads (hessian=input)."
            )
        spread = torch.stack([group.square().mean(-1).sqrt() for group in split_groups(weight, option)], dim=1)
        unit = torch.ones((), device=weight.device)
        scale = stored_scale(spread * best_scale(option.bits, self.state_bits), self.scale_dtype, unit, option.bits)
        scale = torch.where(spread > 0, scale, 0.0)  # none of the values is 0, but a group may be
        return TrellisGrid((scale,), *TrellisGrid.places(weight, option), bits=option.bits, format=self)

    def dequantize(self, quantized: QuantizedWeight, option: Option) -> Tensor:
        """Return ``scale * value[state]`` as float32 ``[out, in]`` (a transposed view of memory ``[in, out]``)."""
        codes = quantized.codes.T.contiguous()  # [in, out]
        table = values_of_states(option.bits, self.state_bits).to(codes.device)
        values = table[states_of(codes, option.bits, self.state_bits)]
        scales = read_scales(quantized.parameters, self.scale_dtype)
        for group, part in enumerate(values.split(option.group_width(len(codes)))):
            part.mul_(scales[group])
        return values.T

    def pack(self, quantized: QuantizedWeight, option: Option) -> dict[str, Tensor]:
        """Return ``qweight`` (planar32) and ``scales [groups, out]``."""
        scales = quantized.parameters["scales"].contiguous()
        return {"qweight": packing.pack(quantized.codes, option.bits), "scales": scales}

    def unpack(self, tensors: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> QuantizedWeight:
        """Invert ``pack``."""
        codes = packing.unpack(tensors["qweight"], option.bits, shape[1])
        return QuantizedWeight(codes=codes, parameters={"scales": tensors["scales"]})

    def packed_layout(self, option: Option, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of the tensors that ``pack`` gives."""
        out_features, in_features = shape
        qweight = packing.packed_shape(out_features, in_features, option.bits), torch.int32
        return {
            "qweight": qweight,
            **scale_layout(option.num_groups(in_features), out_features, self.scale_dtype),
        }


@dataclass(frozen=True, eq=False)
class TrellisGrid(GroupedGrid):
    """The scales of one weight, and the code that they scale."""

    bits: int
    format: Trellis

    def round(self, values: Tensor, position: int | slice) -> tuple[Tensor, Tensor]:
        """Round whole columns, each by its best run of codes; see ``aptq.api.Grid.round``."""
        (scale,) = self._at(position)
        exact = values.reshape(-1, values.shape[-1])
        table = values_of_states(self.bits, self.format.state_bits)
        codes = best_codes(exact, scale.reshape(exact.shape), table, self.bits)
        found = table.to(values.device)[states_of(codes, self.bits, self.format.state_bits)].view(values.shape)
        return codes.view(values.shape), (found * scale).to(values.dtype)

    def finish(self, codes: Tensor) -> QuantizedWeight:
        """Bind codes ``[1, in, rows]`` to the scales, columns back in their natural order."""
        (scale,) = self.parameters
        unit = torch.ones((), device=scale.device)
        return QuantizedWeight(
            codes=self._natural(codes), parameters=pack_scales(self._stored(scale), self.format.scale_dtype, unit)
        )
