"""The C++ kernels as Python functions on tensors."""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aptq.errors import AptqError
from aptq.kernels.cpu.build import build
from aptq.kernels.quantiles import multiplier_of

_log = logging.getLogger(__name__)

TILE = 32
"""Outputs that the kernels compute together."""

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The kernels' numbers of the dtypes that they read and write."""

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
Reference = Any
"""To a structure, as ``ctypes.byref`` gives it; it keeps the structure."""


class _Layer(ctypes.Structure):
    """``struct Layer`` of source/problem.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("qweight", "scales", "below", "qzeros", "levels")),
        *((name, _INT) for name in ("inputs", "outputs", "group", "groups", "bits", "scale_type")),
    )


class _States(ctypes.Structure):
    """``struct States`` of source/trellis_product.h."""

    _fields_ = (("values", _POINTER), ("computed", _POINTER), ("bits", _INT))


class _Rotation(ctypes.Structure):
    """``struct Rotation`` of source/rotate.h."""

    _fields_ = (("signs", _POINTER), ("matrix", _POINTER), ("parts", _INT))


class Packed(NamedTuple):
    """A packed layer as the kernels read it; every tensor is contiguous."""

    qweight: Tensor  # int32 [ceil(in / 32), bits, out]
    scales: Tensor  # [groups, out]
    below: Tensor | None  # [groups, out]: scales of levels below 0, where those have their own
    qzeros: Tensor | None  # int32 [ceil(out / 32), bits, groups]; None: every zero is 2^(bits - 1)
    levels: Tensor | None  # float32 [16]: what codes stand for; None: integers
    in_features: int
    group: int  # inputs that share a scale, a multiple of 32
    states: Tensor | None = None  # as ``read_states`` gives them; None: codes stand for something themselves

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.scales.shape[1]

    def struct(self) -> Reference:
        """Return what the kernels take, a pointer in an array of one; it holds no reference to the tensors."""
        return _layer(
            self.qweight.data_ptr(),
            self.scales.data_ptr(),
            None if self.below is None else self.below.data_ptr(),
            None if self.qzeros is None else self.qzeros.data_ptr(),
            None if self.levels is None else self.levels.data_ptr(),
            self.in_features,
            self.out_features,
            self.group,
            self.scales.shape[0],
            self.qweight.shape[1],
            TYPES[self.scales.dtype],
        )

    def states_struct(self) -> Reference | None:
        """Return what the kernels for states take besides; None where codes stand for something themselves."""
        if self.states is None:
            return None
        at, table = self.states.data_ptr(), self.states.dtype == torch.float32
        return _states(at, None, len(self.states).bit_length() - 1) if table else _states(None, at, 0)


class Turn(NamedTuple):
    """``T = D (C (x) H)`` as the kernels read it."""

    signs: Tensor  # float32 [width]: D
    matrix: Tensor  # float32 [parts, parts], symmetric: C; H, of entries 1 and -1, is width / parts wide

    def struct(self) -> Reference:
        """Return what the kernels take; it holds no reference to the tensors."""
        return _rotation(self.signs.data_ptr(), self.matrix.data_ptr(), self.matrix.shape[0])


def _pointers(structs: Sequence[Any]) -> Reference:
    return (ctypes.POINTER(type(structs[0])) * len(structs))(*map(ctypes.pointer, structs))


# Structures are made once for all calls with the same addresses: that takes longer than a small product. They say
# nothing but what they were made of, so one that is remembered beyond its tensors is never wrong.
@lru_cache(maxsize=1 << 14)
def _layer(*fields: int | None) -> Reference:
    return _pointers([_Layer(*fields)])


@lru_cache(maxsize=256)
def _states(*fields: int | None) -> Reference:
    return _pointers([_States(*fields)])


@lru_cache(maxsize=256)
def _rotation(*fields: int) -> Reference:
    return ctypes.byref(_Rotation(*fields))


def read_states(values: Tensor) -> Tensor:
    """Return what the kernels read of values ``[2^state_bits]`` of states.

    They compute those of ``aptq.kernels.quantiles``, of which they take multiplier and bits of a state, int32 ``[2]``;
    others they look up, float32 as they are.
    """
    multiplier = multiplier_of(values)
    if multiplier is None:
        return values.contiguous()
    return torch.tensor([multiplier, len(values).bit_length() - 1], dtype=torch.int32)


class Library:
    """The functions of one build."""

    def __init__(self, path: str) -> None:
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise AptqError(f"the built kernels {path} cannot be loaded: {error}") from error
        self._multiply, self._dense = library.aptq_multiply, library.aptq_dense
        output, inputs = (_POINTER, _INT), (_POINTER, _INT, _INT)  # with a stride; with rows and a type
        self._multiply.argtypes = [_POINTER, _INT, _POINTER, *output, *inputs, _INT, _INT]
        self._dense.argtypes = [_POINTER, _POINTER, _INT, _INT, _POINTER, _INT, _INT, _INT]
        self._rotate = library.aptq_rotate
        self._rotate.argtypes = [_POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT]
        self._trellis = library.aptq_trellis
        self._trellis.argtypes = [_POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT, _INT]
        self._states_multiply, self._many = library.aptq_trellis_multiply, library.aptq_many
        self._states_multiply.argtypes = [_POINTER, _POINTER, _INT, _POINTER, *output, *inputs, _INT]
        self._many.argtypes = [_POINTER, _POINTER, _POINTER, *output, *inputs, _INT]
        for function in (
            *(self._multiply, self._dense, self._rotate, self._trellis),
            *(self._states_multiply, self._many),
        ):
            function.restype = None
        for function in (library.aptq_fast_bytes, library.aptq_fast_pairs, library.aptq_tiles):
            function.restype = _INT
        self.fast_bytes: bool = library.aptq_fast_bytes() == 1
        """Whether a product of bytes is one instruction here: with it, integers beat any dense float32 product."""
        self.fast_pairs: bool = library.aptq_fast_pairs() == 1
        """Whether ``many`` multiplies bfloat16 in pairs; without, as floats."""
        self.tiles: bool = library.aptq_tiles() == 1
        """Whether torch has an instruction for dense bfloat16 products that these kernels do not use (AMX)."""

    def multiply(
        self, x: Tensor, layer: Packed, digits: int, turn: Turn | None = None, threads: int | None = None
    ) -> Tensor:
        """Return ``x W^T``, or ``x T W^T``, ``[..., out]``, for a contiguous ``x [..., in]`` of a dtype in ``TYPES``.

        Args:
            x: activations.
            layer: the weight.
            digits: bytes that an activation becomes where codes are integers: 1 to 3.
            turn: ``T``; its product is rounded to the dtype of ``x``, as ``rotate`` rounds it.
            threads: default: as many as torch has now.
        """
        y = x.new_empty((*x.shape[:-1], layer.scales.shape[1]))
        struct, rotation = layer.struct(), None if turn is None else turn.struct()
        output, inputs = (y.data_ptr(), y.shape[-1]), (x.data_ptr(), x.numel() // layer.in_features, TYPES[x.dtype])
        threads = threads or torch.get_num_threads()
        if (states := layer.states_struct()) is not None:
            self._states_multiply(struct, states, 1, rotation, *output, *inputs, threads)
        else:
            self._multiply(struct, 1, rotation, *output, *inputs, digits, threads)
        return y

    def multiplier(
        self,
        layers: Sequence[Packed],
        shape: Sequence[int],
        dtype: torch.dtype,
        digits: int,
        turn: Turn | None = None,
        threads: int | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """Return ``multiply`` by some weights of one kind (integers, levels or states) in one call.

        What can be done once for all calls is done here. The function takes contiguous ``x [*shape, in]`` of a dtype
        and returns ``[*shape, out]`` with the outputs of the weights beside each other; it holds no reference to them.
        """
        weights = tuple(layer.struct()[0].contents for layer in layers)
        states = [layer.states_struct() for layer in layers]
        width, rotation = sum(layer.out_features for layer in layers), None if turn is None else turn.struct()
        rows, threads = (math.prod(shape), TYPES[dtype]), threads or torch.get_num_threads()
        last: tuple[int, ...] = (*rows, digits, threads)
        kernel, first = self._multiply, [_pointers(weights)]
        if states[0] is not None:
            kernel, last = self._states_multiply, (*rows, threads)
            first.append(_pointers([each[0].contents for each in states if each is not None]))
        first += [len(layers), rotation]
        to = (*shape, width)

        def multiply(x: Tensor) -> Tensor:
            y = x.new_empty(to)
            kernel(*first, y.data_ptr(), width, x.data_ptr(), *last)
            return y

        return multiply

    def many(self, x: Tensor, layer: Packed, turn: Turn | None = None, threads: int | None = None) -> Tensor:
        """Return what ``multiply`` does, from weights that are unpacked a few at a time: for many rows.

        Weights are rounded to bfloat16 where ``x`` is that and ``fast_pairs``, else float32; sums are float32.
        ``threads`` are as many as torch has now unless told.
        """
        y = x.new_empty((*x.shape[:-1], layer.scales.shape[1]))
        states, rotation = layer.states_struct(), None if turn is None else turn.struct()
        output, inputs = (y.data_ptr(), y.shape[-1]), (x.data_ptr(), x.numel() // layer.in_features, TYPES[x.dtype])
        threads = threads or torch.get_num_threads()
        self._many(layer.struct()[0], states and states[0], rotation, *output, *inputs, threads)
        return y

    def rotate(self, x: Tensor, turn: Turn) -> Tensor:
        """Return ``x T``, like ``x [rows, width]``, contiguous and of a dtype in ``TYPES``."""
        y, (rows, width) = torch.empty_like(x), x.shape
        at = x.data_ptr(), y.data_ptr(), rows, width, TYPES[x.dtype]
        self._rotate(turn.struct(), *at, torch.get_num_threads())
        return y

    def trellis(self, values: Tensor, scales: Tensor, table: Tensor, bits: int) -> Tensor:
        """Return the codes, uint8 ``[columns, rows]``, of the path of least squared error for each column.

        Args:
            values: float32 ``[columns, rows]``, contiguous and finite.
            scales: of each value, likewise.
            table: what each state stands for, float32 ``[2^state_bits]``, contiguous.
            bits: of a code, 1 to 8 and no more than a state has.
        """
        codes, (columns, rows) = torch.empty_like(values, dtype=torch.uint8), values.shape
        at = values.data_ptr(), scales.data_ptr(), table.data_ptr(), codes.data_ptr()
        self._trellis(*at, columns, rows, bits, table.numel().bit_length() - 1, torch.get_num_threads())
        return codes

    def dense(self, layer: Packed, begin: int, end: int, room: Tensor) -> Tensor:
        """Write ``W^T [in, end - begin]`` of some outputs into ``room`` and return that part of it.

        Args:
            layer: the weight.
            begin: the first of the outputs, a multiple of ``TILE``.
            end: behind the last one.
            room: ``[in, end - begin]`` with both rounded up to multiples of ``TILE``, contiguous, float32 or bfloat16.
        """
        to = begin, end, room.data_ptr(), room.shape[1], TYPES[room.dtype]
        states = layer.states_struct()
        self._dense(layer.struct()[0], states and states[0], *to, torch.get_num_threads())
        return room[: layer.in_features, : end - begin]


FOLDER = "~/.cache/aptq/kernels"
"""Where builds are kept unless a user says another place."""


@cache
def load_kernels(architecture: str, folder: str) -> Library:
    """Return the kernels for an architecture, built where that was never done (see ``build``).

    Raises:
        AptqError: they cannot be built or loaded.
    """
    return Library(str(build(architecture, folder)))


@cache
def kernels_for(user: str) -> Library | None:
    """Return this machine's kernels for one who can do without; None, and why in the log, where it cannot have them."""
    try:
        return load_kernels("native", FOLDER)
    except AptqError as error:
        _log.warning("%s does without its kernel, and is slower: %s", user, error)
        return None
