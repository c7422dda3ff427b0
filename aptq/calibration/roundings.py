"""What pass 1 made of every layer at every option, kept on disk until it was scored."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor

from aptq.api import Block, Option
from aptq.files import write_tensors

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True)
class Roundings:
    """One file a block; written once on each machine, for all ranks on it."""

    folder: Path
    fabric: Fabric

    def has(self, index: int) -> bool:
        """Whether a block's are there."""
        return self._path(index).exists()

    def save(self, block: Block, packed: Mapping[str, Mapping[Option, Mapping[str, Tensor]]]) -> None:
        """Write the packed tensors of a block's layers, which all ranks have."""
        if self.fabric.local_rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            tensors = {
                f"{name}/{option.bits}/{option.group_size}/{option.format}/{key}": tensor
                for name, options in packed.items()
                for option, found in options.items()
                for key, tensor in found.items()
            }
            write_tensors(self._path(block.index), tensors, what="rounded layers")

    def load(self, block: Block) -> dict[str, dict[Option, dict[str, Tensor]]]:
        """Return what ``save`` was given, on this rank's device."""
        found: dict[str, dict[Option, dict[str, Tensor]]] = {}
        for key, tensor in load_file(self._path(block.index), device=str(self.fabric.device)).items():
            name, bits, group_size, format, part = key.split("/")
            found.setdefault(name, {}).setdefault(Option(int(bits), int(group_size), format), {})[part] = tensor
        return found

    def remove(self) -> None:
        """Remove all."""
        self.fabric.barrier()
        if self.fabric.local_rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:04d}.safetensors"
