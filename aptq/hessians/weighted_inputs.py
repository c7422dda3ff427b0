"""Gram matrices of a layer's inputs, each token with a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from aptq.api import Block, BlockInputs, CurvatureSum, Layer
from aptq.hessians.gram import add_gram, empty_sum, mirror


class WeightedInputs:
    """``sum_t w_tg x_t x_t^T`` of layers for ``weights`` by name: ``w [all samples, tokens, groups of rows]``."""

    def __init__(self, layers: Mapping[str, Layer], weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._sums = {name: empty_sum(layer, weights[name].shape[-1]) for name, layer in layers.items()}

    def add(self, name: str, x: Tensor, samples: Sequence[int]) -> None:
        """Add a batch of inputs ``[samples, tokens, in]``."""
        total, rows = self._sums[name], x.detach().reshape(-1, x.shape[-1])
        roots = self._weights[name][list(samples)].flatten(0, 1).sqrt().to(total.column)
        for group, root in enumerate(roots.unbind(1)):
            add_gram(total.column[group], rows.to(root.dtype) * root[:, None], 1.0)
        total.tokens += rows.shape[0]

    def pop(self, name: str) -> CurvatureSum:
        """Return the sums of a layer, once, after the last batch."""
        total = self._sums.pop(name)
        mirror(total.column)
        return total


class WeightedLayers:
    """Tells the sums of layers that all batches have come to; see ``aptq.api.LayerObserver``."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights

    def curvature_sum(self, layer: Layer, inputs: Sequence[Tensor], samples: Sequence[Sequence[int]]) -> CurvatureSum:
        """See ``aptq.api.LayerObserver``."""
        weighted = WeightedInputs({layer.name: layer}, self.weights)
        for x, numbers in zip(inputs, samples, strict=True):
            weighted.add(layer.name, x, numbers or range(len(x)))
        return weighted.pop(layer.name)


class WeightedObserver:
    """Adds to the sums of all layers of a block while it runs; ``hook`` is the forward pre-hook of one of them."""

    def __init__(self, block: Block, weights: Mapping[str, Tensor]) -> None:
        self.block = block
        self._weighted = WeightedInputs(block.layers, weights)
        self.samples: Sequence[int] = ()

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return the forward pre-hook of one layer."""

        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            self._weighted.add(name, args[0], self.samples)

        return add

    def __call__(self, inputs: BlockInputs) -> Tensor:
        """Run the block with the hooks on."""
        self.samples = inputs.samples or range(len(inputs.hidden))
        return inputs.run(self.block.module)

    def sums(self) -> Mapping[str, CurvatureSum]:
        """Return the sums of all layers."""
        return {name: self._weighted.pop(name) for name in self.block.layers}
