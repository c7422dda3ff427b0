"""A function of tensors as the operators that it ran, compiled, without the Python between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from aptq.errors import AptqError
from aptq.kernels.operators import Bound, binds

_LARGE = 1 << 20
"""Entries of a dense weight whose product is worth more than one thread."""

_UNKNOWN_SHAPES = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
_INSTEAD = "Decode with the model's own generate()."


class Traced:
    """What ``trace`` returns: the function again, for inputs of the same shapes, an operator after the other.

    Tensors that the function read besides its input, weights among them, are read where they are: nothing is copied,
    and a model that is moved or changed has to be traced again.
    """

    def __init__(self, graph: fx.GraphModule, bound: list[Bound]) -> None:
        self._run: Callable[[Tensor], Any] = graph
        self._graph, self._bound = graph, bound  # the graph knows bound products by number
        self._threads = torch.get_num_threads() if _has_large_products(graph) else 1

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Return what the function returns for ``x``."""
        with _Threads(self._threads):
            y = self._run(x)
        return y if isinstance(y, Tensor) else y[0]

    @torch.no_grad()
    def compile(self, x: Tensor) -> None:
        """Let Inductor compile what lies between products, for inputs like ``x``.

        Raises:
            AptqError: it cannot, for want of a compiler, for one.
        """
        with _Threads(self._threads), warnings.catch_warnings():
            # Inductor's own, of models in bfloat16 whose packed embedding has scales in float16.
            warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed")
            try:
                self._run = torch._inductor.compile(self._graph, [x])
            except RuntimeError as error:
                why = str(error).strip().partition("\n")[0]
                raise AptqError(f"A step of this model cannot be compiled: {why} {_INSTEAD}") from error


@torch.no_grad()
def trace(function: Callable[[Tensor], Tensor], x: Tensor) -> Traced:
    """Run ``function(x)`` once and return what it ran: operators in their order, on tensors of the same shapes.

    Products with packed weights are bound to their weights (``aptq.kernels.operators``), so that a call is little more
    than the kernel, on as many threads as torch has now. Where all large weights are packed, torch itself gets one
    thread: others of its own would only take cores from the products'.

    Args:
        function: of one tensor; it may change tensors of its own in place, as caches do, which the call here does too.
        x: the input that it is run on.

    Raises:
        AptqError: the function has operators whose results' shapes depend on values, or reads values itself, so that
            what it does for another input may be something else.
    """
    try:
        # A lambda: make_fx counts the arguments of methods wrongly.
        graph = make_fx(lambda each: function(each), tracing_mode="real", _allow_non_fake_inputs=True)(x)
    except RuntimeError as error:
        if "tracing" not in str(error):
            raise
        why = str(error).strip().partition("\n")[0]
        raise AptqError(f"This model decides by its activations what it runs: {why} {_INSTEAD}") from error
    for node in graph.graph.nodes:
        if _has_unknown_shape(node):
            raise AptqError(
                f"This model runs {node.target}, whose result's shape depends on values (mixtures of experts do), so "
                f"that a step of it cannot be captured. {_INSTEAD}"
            )
    bound = _bind_products(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return Traced(graph, bound)


class _Threads:
    """So many threads for torch's own operators while the context lasts."""

    def __init__(self, count: int) -> None:
        self._count, self._before = count, count

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        if self._before != self._count:
            torch.set_num_threads(self._count)

    def __exit__(self, *_: object) -> None:
        if self._before != self._count:
            torch.set_num_threads(self._before)


def _has_unknown_shape(node: fx.Node) -> bool:
    """Return whether the shape of a node's result may differ for other values."""
    if node.target is torch.ops.aten.index.Tensor:  # integers give shapes that are known
        indices: Any = node.args[1]
        return any(each is not None and each.meta["val"].dtype in (torch.bool, torch.uint8) for each in indices)
    return any(tag in getattr(node.target, "tags", ()) for tag in _UNKNOWN_SHAPES)


def _has_large_products(graph: fx.GraphModule) -> bool:
    """Return whether there are products with large weights that are not packed."""
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
    return any(
        argument.meta["val"].numel() >= _LARGE
        for node in graph.graph.nodes
        if node.target in products
        for argument in node.all_input_nodes
    )


def _bind_products(graph: fx.GraphModule) -> list[Bound]:
    """Put ``aptq::bound`` in the place of products, one for all that read the same input; return what it looks up."""
    products: dict[tuple[Any, fx.Node], list[tuple[fx.Node, tuple[Any, ...]]]] = {}
    for node in graph.graph.nodes:
        if binds(node.target) and (weight := _weight(graph, node)) is not None:
            products.setdefault((node.target, node.args[0]), []).append((node, weight))
    bound = []
    for (target, _), mine in products.items():
        x: Any = mine[0][0].args[0]  # by now perhaps the result of another product
        ends = list(accumulate(node.meta["val"].shape[-1] for node, _ in mine))
        bound.append(Bound(target, [weight for _, weight in mine], x.meta["val"]))
        with graph.graph.inserting_before(mine[0][0]):
            together = graph.graph.call_function(torch.ops.aptq.bound.default, (x, bound[-1].number, ends[-1]))
        for (node, _), begin, end in zip(mine, [0, *ends], ends, strict=False):
            with graph.graph.inserting_before(node):
                own = together if len(mine) == 1 else _columns(graph.graph, together, begin, end)
            own.meta = node.meta
            node.replace_all_uses_with(own)
            graph.graph.erase_node(node)
    return bound


def _columns(graph: fx.Graph, together: fx.Node, begin: int, end: int) -> fx.Node:
    """Return some columns of a result, contiguous as the product by itself was."""
    own = graph.call_function(torch.ops.aten.slice.Tensor, (together, -1, begin, end))
    return graph.call_function(torch.ops.aten.clone.default, (own,), {"memory_format": torch.contiguous_format})


def _weight(graph: fx.GraphModule, node: fx.Node) -> tuple[Any, ...] | None:
    """Return the arguments of a product behind its input where they stay what they are, else None."""
    arguments: list[Any] = []
    for argument in node.args[1:]:
        if not isinstance(argument, fx.Node):
            arguments.append(argument)
        elif argument.op == "get_attr":
            arguments.append(getattr(graph, str(argument.target)))
        else:
            return None
    return tuple(arguments)
