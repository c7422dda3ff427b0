"""What modules have in common that keep a matrix packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from aptq.api import Format, Option


class PackedModule(nn.Module):
    """A matrix ``[rows, columns]``, stored as the packed tensors of a format.

    They are buffers under the names that ``format.packed_layout`` gives, so that the state dict is the checkpoint, or
    are those of another module, with which this one shares the matrix.

    Args:
        shape: ``(rows, columns)``.
        format: what the codes mean.
        format_name: the format's name in the registry.
        option: bits and group size.
        dtype: of what the module gives; default: torch's default dtype.
        holder: the module whose matrix this is, too; default: it has one of its own.

    Raises:
        AptqError: when the format cannot store a matrix of this shape at this option.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        format: Format,
        format_name: str,
        option: Option,
        dtype: torch.dtype | None = None,
        holder: PackedModule | None = None,
    ) -> None:
        super().__init__()
        self.format, self.format_name, self.option = format, format_name, option
        self.dtype = dtype or torch.get_default_dtype()
        self._shape = shape
        format.check(option, shape)
        layout = format.packed_layout(option, shape)
        self.packed_names = tuple(layout)
        # In a tuple it is no child of ours: it has its place in the model, and is saved and moved there.
        self._holders = () if holder is None else (holder,)
        for name, (size, stored) in layout.items() if holder is None else ():
            self.register_buffer(name, torch.zeros(size, dtype=stored))

    @property
    def holder(self) -> PackedModule:
        """Whose buffers the packed tensors are."""
        return self._holders[0] if self._holders else self

    @property
    def device(self) -> torch.device:
        """Where the packed tensors are."""
        return self.holder.get_buffer(self.packed_names[0]).device

    def packed(self) -> dict[str, Tensor]:
        """Return the tensors of the checkpoint by name."""
        return {name: self.holder.get_buffer(name) for name in self.packed_names}

    def stored(self) -> Tensor:
        """Return the matrix ``[rows, columns]`` in float32 that the packed tensors stand for."""
        return self.format.dequantize(self.format.unpack(self.packed(), self.option, self._shape), self.option)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but never cast, what the checkpoint holds: scales rounded to another dtype would be other weights."""
        own = {} if self._holders else self.packed()
        cast = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in own.items():
            moved = self.get_buffer(name)
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        self.dtype = cast.dtype
        return self
