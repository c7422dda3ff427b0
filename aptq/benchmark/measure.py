"""Every case of a benchmark: correctness first, then time."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aptq.api import AptqError, Backend, Format, Option, format_of
from aptq.benchmark.layers import Weight, dense_calls, packed_calls, random_weight
from aptq.benchmark.timing import Timing, copy_bandwidth, time_in_turn
from aptq.decode_times import DENSE
from aptq.options import formats_by_name, offered

_log = logging.getLogger(__name__)
_WRONG = 0.05  # relative error above which a product is no product of this weight, in any precision
_BF16, _FP32 = "dense bfloat16", "dense float32"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Row = dict[str, Any]
"""A row of ``benchmark.json``."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is timed: every shape at every number of bits and group size, with every number of rows and dtype.

    Raises:
        AptqError: nothing to time, or a number or dtype that cannot be.
    """

    shapes: list[list[int]]
    rows: list[int] = field(default_factory=lambda: [1])
    bits: list[int] = field(default_factory=lambda: [4])
    group_size: int | list[int] | None = None
    backends: list[Any] | None = None  # names, or mappings with a name and options
    dtypes: list[str] = field(default_factory=lambda: ["float32"])
    model: str | None = None
    rounds: int = 12
    seconds: float = 0.03

    def __post_init__(self) -> None:
        for name in ("rows", "bits", "dtypes"):
            if not getattr(self, name):
                raise AptqError(f"benchmark.{name} is empty: there is nothing to time.")
        if any(len(shape) != 2 or min(shape) < 1 for shape in self.shapes) or min(self.rows) < 1:
            raise AptqError(
                f"benchmark.shapes={self.shapes} and benchmark.rows={self.rows} have to be lists of [out, in] and of "
                "numbers, all of them positive."
            )
        if unknown := [dtype for dtype in self.dtypes if dtype not in DTYPES]:
            raise AptqError(f"benchmark.dtypes has {', '.join(unknown)}; use some of {', '.join(DTYPES)}.")
        if self.rounds < 1 or self.seconds <= 0:
            raise AptqError(f"benchmark.rounds={self.rounds} and seconds={self.seconds} have to be positive.")

    def options(self, format: Format, format_name: str) -> list[Option]:
        """Return every option that is timed; of a ``FormatSet``, those of every format that has the width."""
        formats = formats_by_name(format, format_name)
        sizes = [self.group_size] if isinstance(self.group_size, int) else self.group_size or []
        options = offered(formats, self.bits, sizes)
        return [option for option in options if len(formats) == 1 or _has(formats[option.format], option)]


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a backend did not run a layer."""

    backend: str
    case: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a benchmark found."""

    rows: list[Row]
    spread: list[Timing]  # of each row
    refusals: list[Refusal]


def run_benchmark(
    settings: Benchmark,
    format: Format,
    format_name: str,
    backends: Mapping[str, Backend],
    device: torch.device,
    on_case: Callable[[float, str], None],
    seed: int = 0,
) -> Result:
    """Run all cases; ``on_case(done, what)`` is told before each.

    Besides the backends' rows there is one with the dense product in float32 for every shape and number of rows, with
    backend "dense" and 32 bits; that in bfloat16 is in every row.

    Raises:
        AptqError: the format cannot store one of the shapes at one of the options.
    """
    result = Result(rows=[], spread=[], refusals=[])
    bandwidth = copy_bandwidth(device)
    options = settings.options(format, format_name)
    cases = list(product(map(tuple, settings.shapes), options))
    for done, (shape, option) in enumerate(cases):
        case = f"{shape[0]}x{shape[1]}, {option.bits} bits"
        on_case(done, case)
        weight = random_weight(format_of(format, option), option, (shape[0], shape[1]), device, seed)
        with_dense = option == options[0]
        for count, rows in enumerate(settings.rows):
            on_case(done + count / len(settings.rows), f"{case}, {rows} rows")
            contenders = dict(_accepted(settings, weight, backends, rows, result.refusals, seed))
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(seed)).to(device)
            references = {_BF16: dense_calls(weight, x.bfloat16())}
            if with_dense:
                references[_FP32] = dense_calls(weight, x)
            calls = {**references, **{name: each.calls for name, each in contenders.items()}}
            found = time_in_turn(calls, settings.rounds, settings.seconds, device)
            for name, timing in found.items():
                if name != _BF16:
                    row = _row(weight, contenders.get(name), rows, timing, found[_BF16], bandwidth)
                    result.rows.append(row)
                    result.spread.append(timing)
    return result


def _has(format: Format, option: Option) -> bool:
    """Whether a format has a width at all, whatever the layer."""
    try:
        format.check(option, (128, 128))
    except AptqError:
        return False
    return True


@dataclass(frozen=True, eq=False, kw_only=True)
class _Contender:
    backend: str
    dtype: str
    calls: Sequence[Callable[[], Tensor]]
    error: float


def _accepted(
    settings: Benchmark,
    weight: Weight,
    backends: Mapping[str, Backend],
    rows: int,
    refusals: list[Refusal],
    seed: int,
) -> Iterator[tuple[str, _Contender]]:
    """Yield every backend that accepts the layer and multiplies right, for every dtype; note the others."""
    shape = tuple(weight.dense.shape)
    for name, dtype in product(backends, settings.dtypes):
        backend, spec = backends[name], weight.spec(DTYPES[dtype])
        case = f"{shape[0]}x{shape[1]}, {weight.option.bits} bits, groups of {weight.option.group_size}, {dtype}"
        reason = backend.refuses(spec)
        if reason is None:
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(seed + 1))
            x = x.to(weight.dense.device, DTYPES[dtype])
            calls = packed_calls(backend, weight, x)
            exact = x.double() @ weight.dense.double().T
            error = float((calls[0]().double() - exact).norm() / exact.norm())
            if error <= _WRONG:
                yield f"{name} {dtype}", _Contender(backend=name, dtype=dtype, calls=calls, error=error)
                continue
            reason = f"its product is wrong: relative error {error:.2g}"
        refusal = Refusal(backend=name, case=case, reason=reason)
        if refusal not in refusals:
            refusals.append(refusal)
            _log.info("backend %s does not run %s: %s", name, case, reason)


def _row(
    weight: Weight, contender: _Contender | None, rows: int, timing: Timing, bf16: Timing, bandwidth: float
) -> Row:
    """Return a row of ``benchmark.json``; without a contender, that of the dense product in float32."""
    out_features, in_features = weight.dense.shape
    size = weight.dense.nbytes if contender is None else weight.num_bytes
    element = 4 if contender is None else DTYPES[contender.dtype].itemsize
    moved = size + rows * (out_features + in_features) * element
    device = weight.dense.device
    return {
        "backend": DENSE if contender is None else contender.backend,
        "format": "float32" if contender is None else weight.option.format,
        "bits": 32 if contender is None else weight.option.bits,
        "group_size": -1 if contender is None else weight.option.group_size,
        "shape": [out_features, in_features],
        "rows": rows,
        "dtype": "float32" if contender is None else contender.dtype,
        "seconds": timing.median,
        "dense_bf16_seconds": bf16.median,
        "speedup": bf16.median / timing.median,
        "relative_error": 0.0 if contender is None else contender.error,
        "bytes": size,
        "bandwidth_fraction": moved / timing.median / bandwidth,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
    }


def _cpu_name() -> str:
    """Name the processor and how many threads are used."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        told = ""
    name = next((line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
