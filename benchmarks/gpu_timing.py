"""Times on a GPU without what starting kernels costs, and weights that are made there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aptq.api import Format, LayerSpec, Option

ROTATED = 192 << 20
"""Bytes of weights that are read before one is read again: more than the caches of today's GPUs hold."""
MOST_COPIES = 64


def packed_tensors(format: Format, option: Option, shape: tuple[int, int], device: str) -> dict[str, Tensor]:
    """Return random tensors as a format stores a layer ``[out, in]``.

    Codes are any bits, so that only formats of which every code means something are served.
    """
    generator = torch.Generator(device).manual_seed(0)
    layout, size_of_weights = format.packed_layout(option, shape), shape[1] ** -0.5
    tensors = {}
    for name, (size, dtype) in layout.items():
        tensor = torch.empty(size, dtype=dtype, device=device)
        if dtype == torch.int32:
            tensor.random_(-(2**31), 2**31 - 1, generator=generator)
        elif dtype == torch.uint8 and "scale_unit" in layout:  # 176 to 240 in e4m3
            tensor.random_(115, 120, generator=generator)
        elif dtype == torch.uint8:  # exponents of two
            middle = 127 + round(math.log2(size_of_weights))
            tensor.random_(middle - 1, middle + 2, generator=generator)
        elif name == "scale_unit":
            tensor.fill_(size_of_weights / 200)
        else:
            tensor.uniform_(0.5, 1.5, generator=generator)
            if name not in ("row_scales", "column_scales"):  # what these scale has the size of weights already
                tensor.mul_(size_of_weights)
        tensors[name] = tensor
    return tensors


def spec_of(format: Format, option: Option, shape: tuple[int, int], dtype: torch.dtype, device: str) -> LayerSpec:
    """Return what a backend is asked about a layer."""
    return LayerSpec(
        out_features=shape[0],
        in_features=shape[1],
        format=format,
        format_name=option.format,
        option=option,
        dtype=dtype,
        device=torch.device(device),
    )


def copies(num_bytes: int) -> int:
    """Return how many weights of a size are read in turn."""
    return max(2, min(MOST_COPIES, -(-ROTATED // num_bytes)))


def graph_seconds(calls: Sequence[Callable[[], Tensor]], replays: int = 15) -> float:
    """Return the median seconds of a call, all of them captured in one CUDA graph that is replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        for call in calls[:2]:  # whatever is compiled or allocated once is so now, outside the graph
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        for call in calls:
            call()
    found = []
    for replay in range(replays + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 2:
            found.append(begin.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(found)


def rotating(tensors: dict[str, Tensor], product: Callable[[dict[str, Tensor]], Tensor]) -> list[Callable[[], Tensor]]:
    """Return products with copies of a weight's tensors, more of them than a cache holds."""
    size = sum(tensor.nbytes for tensor in tensors.values())

    def call(own: dict[str, Tensor]) -> Callable[[], Tensor]:
        return lambda: product(own)

    return [call({name: tensor.clone() for name, tensor in tensors.items()}) for _ in range(copies(size))]
