"""Who will serve the result, and what it can: data, one entry a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aptq.api import AptqError, Option
from aptq.typed import nearest


@dataclass(frozen=True, kw_only=True)
class Target:
    """What one consumer of checkpoints accepts.

    ``group_multiple`` is what every group size must be a multiple of, ``group_sizes`` the only ones allowed (None: any
    multiple), ``per_row`` whether -1 is allowed too. ``divisible`` says that the group size must divide a layer's
    input width. ``fused`` says that layers which the consumer fuses (query, key and value; gate and up) must have one
    option; allocators see to that. ``exporter`` writes what it reads.
    """

    name: str
    bits: tuple[int, ...]
    group_multiple: int = 1
    group_sizes: tuple[int, ...] | None = None
    per_row: bool = True
    divisible: bool = False
    fused: bool = False
    exporter: str = "compressed_tensors"

    def check_exporter(self, name: str) -> None:
        """Raise ``AptqError`` for an exporter whose files this consumer does not read; aptq's are always there."""
        if self.exporter not in ("native", name):
            raise AptqError(f"Target {self.name} reads what exporter={self.exporter} writes; got exporter={name}.")

    def check(self, options: Sequence[Option], shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ``AptqError`` unless every option can be served for every layer ``{name: (out, in)}``."""
        for option in options:
            self._check_option(option)
            if self.divisible and option.group_size != -1:
                self._check_widths(option.group_size, shapes)

    def _check_option(self, option: Option) -> None:
        if option.bits not in self.bits:
            allowed = ", ".join(map(str, self.bits))
            raise AptqError(f"Target {self.name} serves {allowed} bits; got bits={option.bits}.")
        size = option.group_size
        served = self.per_row if size == -1 else size > 0 and size % self.group_multiple == 0
        if not served or (size != -1 and self.group_sizes is not None and size not in self.group_sizes):
            raise AptqError(f"Target {self.name} serves {self._group_rule()}; got group_size={size}.")

    def _check_widths(self, size: int, shapes: Mapping[str, tuple[int, int]]) -> None:
        for name, (_, width) in shapes.items():
            if width % size:
                raise AptqError(
                    f"Target {self.name} needs group sizes that divide a layer's input width; "
                    f"{size} does not divide the {width} of {name}."
                )

    def _group_rule(self) -> str:
        """Say which group sizes are allowed."""
        sizes = f"multiples of {self.group_multiple}"
        if self.group_sizes is not None:
            sizes = ", ".join(map(str, self.group_sizes))
        return f"group sizes {sizes}" + (" and -1 (a whole row)" if self.per_row else "")


_ALL = (2, 3, 4, 5, 6, 7, 8)
_GPTQ = (32, 64, 128, 256, 512, 1024)
# The packed layout stores 32 weights of a row as one unit; one that spans two groups would need two scales. Groups of
# 16, NVFP4's, are for backends that dequantize first.
# vLLM (0.25 and later) and SGLang: read in their sources and documents, see docs/export.md; not run here.
_TARGETS = (
    Target(name="native", bits=(1, *_ALL), group_multiple=16, exporter="native"),
    Target(name="transformers", bits=_ALL, group_multiple=32, divisible=True),
    Target(name="gptq", bits=(2, 3, 4, 8), group_sizes=_GPTQ, divisible=True, exporter="gptq"),
    Target(name="vllm", bits=_ALL, group_multiple=32, group_sizes=(32, 64, 128), divisible=True, fused=True),
    Target(name="vllm_cpu", bits=(4,), group_multiple=32, group_sizes=(32, 64, 128), divisible=True, fused=True),
    Target(name="sglang", bits=(4, 8), group_multiple=32, group_sizes=(32, 64, 128), divisible=True, fused=True),
)


def get_target(name: str) -> Target:
    """Return a target by name; raise ``AptqError`` with the nearest name when there is none."""
    targets = {target.name: target for target in _TARGETS}
    if name not in targets:
        raise AptqError(f"Unknown target {name!r}.{nearest(name, targets)} Targets: {', '.join(targets)}.")
    return targets[name]


def fuses(target: Target, asked: bool | None) -> bool:
    """Return whether layers that are run as one must share an option: as asked, or as the target needs it.

    Raises:
        AptqError: the target needs it, and the config says that they need not.
    """
    if target.fused and asked is False:
        raise AptqError(
            f"fused=false: target={target.name} runs query, key and value (and gate and up) as one, and "
            "needs one option for them; leave fused out."
        )
    return target.fused or bool(asked)
