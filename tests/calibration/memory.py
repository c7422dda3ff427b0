"""Finished blocks without a disk."""

from torch import Tensor

from aptq.api import LayerReport


class Memory:
    """A block store without a disk."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[dict[str, Tensor], list[LayerReport]]] = {}

    def block_done(self, index: int) -> bool:
        return index in self.blocks

    def save_block(self, index: int, tensors: dict[str, Tensor], reports: list[LayerReport]) -> None:
        self.blocks[index] = (tensors, reports)

    def load_block(self, index: int) -> tuple[dict[str, Tensor], list[LayerReport]]:
        return self.blocks[index]
