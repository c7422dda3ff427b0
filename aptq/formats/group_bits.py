"""Another format whose groups of input columns have a bit more or fewer, by what their errors cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from aptq.api import AptqError, Format, FormatSet, Option, QuantizedWeight, RoundableFormat
from aptq.formats.group_choice import Choice, fits, least_cost
from aptq.formats.group_grid import AROUND, GroupBitsGrid, Part, columns_of, part_of
from aptq.formats.grouped import coded_apart, split_groups
from aptq.packing import UNIT

WIDTHS = "group_widths"
"""Bits of each group, uint8 ``[groups]``, among the parameters."""

MEMBERS = "group_members"
"""Group of each input, uint8 (int16 above 256 groups) ``[in]``, where groups are not of neighbours."""

_GROUPINGS = ("neighbours", "salience")

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class GroupBits:
    """Weights in the format ``inner``, at the option's bits ``N`` on average, but not in each group of inputs.

    ``group_size`` inputs share one width over all outputs; widths lie within ``spread`` of ``N``, and as many bits are
    given as taken. Which groups get them is the exact optimum (``aptq.formats.group_choice``) of what rounding costs,

        cost_g(b) = sum over the inputs j of group g and all outputs i of  h_j (w_ij - q_ij(b))^2

    with ``q(b)`` the nearest value of ``inner`` at ``b`` bits and ``h_j`` the importance of the input (1 without one):
    ``H_jj`` under ``quantizer=nearest``, and under those that feed errors back ``1 / U_jj^2``, which makes it their
    own objective. Where ``inner`` has no codes of 1 bit, those are ``one_bit``'s; widths that neither has are not used.

    ``grouping="salience"`` tries groups of inputs of like salience ``h_j sum_i w_ij^2`` as well as those of neighbours,
    and takes what costs less in the layer; the group of each input is then stored. A last group that is shorter keeps
    ``N`` bits.

    Codes of all widths are stored one after another, each packed as ``inner`` packs a layer of those inputs alone, and
    take what ``inner`` takes at ``N`` bits; ``group_widths`` adds 8 bits a group, ``group_members`` 8 an input.

    Source: Huang et al., "SliM-LLM: Salience-Driven Mixed-Precision Quantization for LLMs" (ICML 2025), section 3.2.
    """

    inner: Format
    one_bit: Format
    spread: int = 1
    grouping: str = "neighbours"

    def __post_init__(self) -> None:
        for name, format in (("inner", self.inner), ("one_bit", self.one_bit)):
            if isinstance(format, FormatSet):
                raise AptqError(f"format.{name} is several formats; give each of them its own format=group_bits.")
        if self.spread < 0:
            raise AptqError(f"format.spread={self.spread} is not allowed; use 0 (no bits are moved) or more.")
        if self.grouping not in _GROUPINGS:
            raise AptqError(f"format.grouping={self.grouping!r} is not known; use one of {', '.join(_GROUPINGS)}.")

    @property
    def group_size(self) -> int:
        """That of ``inner``."""
        return self.inner.group_size

    def check(self, option: Option, shape: tuple[int, int]) -> None:
        """Raise ``AptqError`` when ``inner`` cannot store a layer so, or not in parts of several widths."""
        self.inner.check(option, shape)
        if option.num_groups(shape[1]) < 2:
            return
        if option.group_size % UNIT:
            raise AptqError(
                f"format=group_bits takes groups of a multiple of {UNIT} inputs, which are packed without a gap, "
                f"and whole rows; got group_size={option.group_size}."
            )
        sizes = {bits: self._sizes(bits, option, 1, shape[0]) for bits in self._allowed(option, shape)}
        for bits, size in sizes.items():
            twice = self._sizes(bits, option, 2, shape[0])
            if twice != {name: 2 * each for name, each in size.items()}:
                raise AptqError(
                    "format.inner stores what is no group's, such as outliers or a scale's unit; put it around."
                )
        for below in range(option.bits - self.spread, option.bits):
            for above in range(option.bits + 1, option.bits + self.spread + 1):
                if below in sizes and above in sizes and not fits(sizes, below, option.bits, above):
                    raise AptqError(
                        f"What format.inner stores at {below} and {above} bits is more than at {option.bits}."
                    )
        if option not in self._tried:
            with torch.device("cpu"):  # whatever the caller makes: layers are made on meta first
                for bits in sizes:
                    grid = self._format(bits).fit(torch.zeros(1, 1, UNIT), replace(option, bits=bits))
                    coded_apart(grid, AROUND)
            self._tried.add(option)

    @cached_property
    def _tried(self) -> set[Option]:
        """Options that all widths are known to code each weight by itself at: it takes a fit to know."""
        return set()

    def _format(self, bits: int) -> Format:
        return self.one_bit if bits == 1 and not self._has_one_bit else self.inner

    @cached_property
    def _has_one_bit(self) -> bool:
        """Whether ``inner`` has codes of 1 bit itself."""
        try:
            self.inner.check(Option(bits=1, group_size=-1), (1, UNIT))
        except AptqError:
            return False
        return True

    def _allowed(self, option: Option, shape: tuple[int, int]) -> list[int]:
        """Return the widths that groups may have, in rising order: those that there are, ``N`` among them."""
        found = []
        for bits in range(max(option.bits - self.spread, 1), option.bits + self.spread + 1):
            try:
                self._format(bits).check(replace(option, bits=bits), shape)
            except AptqError:
                continue
            found.append(bits)
        return found

    def _sizes(self, bits: int, option: Option, groups: int, out_features: int) -> dict[str, int]:
        """Return how many elements some whole groups take, by name of the tensor."""
        shape = (out_features, groups * option.group_size)
        layout = self._format(bits).packed_layout(replace(option, bits=bits), shape)
        return {name: prod(size) for name, (size, _) in layout.items()}

    def fit(self, weight: Tensor, option: Option, importance: Tensor | None = None) -> GroupBitsGrid:
        """Choose the widths of a weight ``[heads, rows, in]`` and fit ``inner`` to the groups of each."""
        tried = (self._chosen(weight, option, importance, each) for each in self._members(weight, option, importance))
        chosen = min(tried, key=lambda choice: choice.cost)
        parts = []
        for bits, columns in columns_of(chosen.widths, chosen.members):
            weighed = None if importance is None else importance[:, columns]
            grid = self._format(bits).fit(weight[..., columns], replace(option, bits=bits), weighed)
            parts.append(Part(bits=bits, columns=columns, grid=coded_apart(grid, AROUND)))
        return GroupBitsGrid.around(parts, weight.shape[0], self._told(chosen))

    def _members(self, weight: Tensor, option: Option, importance: Tensor | None) -> list[Tensor]:
        """Return the groups to choose among: the group of each input, ``[in]``."""
        width = weight.shape[-1]
        groups = torch.arange(width, device=weight.device) // option.group_width(width)
        if self.grouping == "neighbours" or option.num_groups(width) == 1:
            return [groups]
        squares = weight.square().sum(1)
        salience = (squares if importance is None else squares * importance).sum(0)
        return [groups, torch.empty_like(groups).scatter_(0, salience.argsort(descending=True, stable=True), groups)]

    def _told(self, chosen: Choice) -> dict[str, Tensor]:
        """Return what is stored of the groups."""
        told = {WIDTHS: chosen.widths.to(torch.uint8)}
        if self.grouping == "neighbours":
            return told
        return {**told, MEMBERS: chosen.members.to(_index_dtype(len(chosen.widths)))}

    def _chosen(self, weight: Tensor, option: Option, importance: Tensor | None, members: Tensor) -> Choice:
        """Return the widths of least cost for some groups."""
        heads, rows, width = weight.shape
        groups = option.num_groups(width)
        allowed = self._allowed(option, (heads * rows, width)) if groups > 1 else [option.bits]
        if len(allowed) == 1 and self.grouping == "neighbours":
            return Choice(members, torch.full((groups,), option.bits, device=weight.device), 0.0)
        order = members.argsort(stable=True)
        ordered = weight[..., order]
        weighed = None if importance is None else importance[:, order]
        costs = torch.stack([self._costs(ordered, replace(option, bits=bits), weighed) for bits in allowed], dim=1)
        widths = torch.tensor(allowed)
        if width % option.group_width(width):
            costs[-1, widths != option.bits] = float("inf")
        choice = least_cost(costs, widths - option.bits)
        cost = float(costs.cpu().gather(1, choice[:, None]).sum())
        return Choice(members, widths[choice].to(weight.device), cost)

    def _costs(self, weight: Tensor, option: Option, importance: Tensor | None) -> Tensor:
        """Return what rounding to nearest at the option's bits costs, float64 ``[groups]``."""
        columns = weight.transpose(1, 2)
        grid = self._format(option.bits).fit(weight, option, importance)
        error = (grid.round(columns, slice(None))[1] - columns).square_().sum(-1).double()  # [heads, in]
        weighed = error if importance is None else error * importance
        return torch.stack([group.sum() for group in split_groups(weighed, option)])

    def grid(self, quantized: QuantizedWeight, option: Option) -> GroupBitsGrid:
        """Return the grid that a stored weight lies on; see ``aptq.api.RoundableFormat``.

        Raises:
            AptqError: ``inner`` cannot give one.
        """
        parts = []
        for bits, columns in _columns(quantized.parameters, option, quantized.codes.shape[1]):
            format = self._format(bits)
            if not isinstance(format, RoundableFormat):
                raise AptqError(f"{format} does not give back the grid of a stored weight.")
            grid = format.grid(part_of(quantized, bits, columns), replace(option, bits=bits))
            parts.append(Part(bits=bits, columns=columns, grid=coded_apart(grid, AROUND)))
        told = {name: quantized.parameters[name] for name in (WIDTHS, MEMBERS) if name in quantized.parameters}
        return GroupBitsGrid.around(parts, 1, told)

    def dequantize(self, quantized: QuantizedWeight, option: Option) -> Tensor:
        """Return the weight in float32 ``[out, in]`` (a transposed view of memory ``[in, out]``)."""
        out_features, in_features = quantized.codes.shape
        weight = torch.empty(in_features, out_features, device=quantized.codes.device)
        for bits, columns in _columns(quantized.parameters, option, in_features):
            part = part_of(quantized, bits, columns)
            weight[columns] = self._format(bits).dequantize(part, replace(option, bits=bits)).T
        return weight.T

    def pack(self, quantized: QuantizedWeight, option: Option) -> dict[str, Tensor]:
        """Return the tensors of ``inner``, each a run of those of all widths from the least, and the widths."""
        runs: dict[str, list[Tensor]] = {}
        told: dict[str, Tensor] = {}
        layout = self.packed_layout(option, (quantized.codes.shape[0], quantized.codes.shape[1]))
        for bits, columns in _columns(quantized.parameters, option, quantized.codes.shape[1]):
            packed = self._format(bits).pack(part_of(quantized, bits, columns), replace(option, bits=bits))
            for name, tensor in packed.items():
                runs.setdefault(name, []).append(tensor.flatten())
        for name, ((size, *_), _) in layout.items():
            told[name] = _padded(torch.cat(runs[name]), size) if name in runs else quantized.parameters[name]
        return told

    def unpack(self, tensors: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> QuantizedWeight:
        """Invert ``pack``."""
        device = tensors[WIDTHS].device
        codes = torch.empty(shape[1], shape[0], dtype=torch.int32, device=device)
        parameters = {name: tensors[name] for name in (WIDTHS, MEMBERS) if name in tensors}
        start = dict.fromkeys(tensors, 0)
        for bits, columns in _columns(tensors, option, shape[1]):
            format, narrower = self._format(bits), replace(option, bits=bits)
            part = {}
            for name, (size, _) in format.packed_layout(narrower, (shape[0], len(columns))).items():
                stop = start[name] + prod(size)
                part[name] = tensors[name][start[name] : stop].view(size)
                start[name] = stop
            unpacked = format.unpack(part, narrower, (shape[0], len(columns)))
            codes[columns] = unpacked.codes.T.to(torch.int32)
            parameters |= {f"{bits}.{name}": tensor for name, tensor in unpacked.parameters.items()}
        return QuantizedWeight(codes=codes.T, parameters=parameters)

    def packed_layout(self, option: Option, shape: tuple[int, int]) -> Layout:
        """Return shape and dtype of the tensors that ``pack`` gives."""
        groups = option.num_groups(shape[1])
        inner = self.inner.packed_layout(option, shape)
        layout: Layout = {name: ((prod(size),), dtype) for name, (size, dtype) in inner.items()}
        layout[WIDTHS] = ((groups,), torch.uint8)
        return layout if self.grouping == "neighbours" else {**layout, MEMBERS: ((shape[1],), _index_dtype(groups))}


def _columns(stored: Mapping[str, Tensor], option: Option, in_features: int) -> list[tuple[int, Tensor]]:
    """Return the widths of a stored layer and their columns; see ``columns_of``."""
    widths = stored[WIDTHS]
    neighbours = torch.arange(in_features, device=widths.device) // option.group_width(in_features)
    return columns_of(widths, stored.get(MEMBERS, neighbours))


def _index_dtype(groups: int) -> torch.dtype:
    return torch.uint8 if groups <= 1 << 8 else torch.int16


def _padded(run: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(run, (0, size - len(run)))
