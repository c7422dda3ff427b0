"""What the kernels become on a GPU that need not be there: registers, spills and instructions, from Triton's own tools.

Triton compiles for any target and brings NVIDIA's assembler and disassembler. It must not be in its interpreting mode
(``TRITON_INTERPRET``).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aptq.kernels.triton.blocks import blocks_dense, blocks_gemv
from aptq.kernels.triton.configs import UNIT, Config
from aptq.kernels.triton.dense import dense
from aptq.kernels.triton.dot import dot
from aptq.kernels.triton.gemv import gemv
from aptq.kernels.triton.states import states_dense, states_gemv
from aptq.kernels.triton.vectors import vectors_dense, vectors_gemv
from aptq.kernels.triton.weight import PRIMARY

KERNELS = {
    "gemv": gemv,
    "dot": dot,
    "dense": dense,
    "states_gemv": states_gemv,
    "states_dense": states_dense,
    "blocks_gemv": blocks_gemv,
    "blocks_dense": blocks_dense,
    "vectors_gemv": vectors_gemv,
    "vectors_dense": vectors_dense,
}
"""By the name that results are kept under."""
_TYPES = {
    "words": "*i32",
    "scales": "*fp16",
    "below": "*fp16",
    "zeros": "*u8",
    "levels": "*fp32",
    "values": "*fp32",
    "scale_values": "*fp32",
    "selectors": "*i16",
    "residual_words": "*i32",
    **dict.fromkeys(("codebook", "residual_codebook", "row_scales", "column_scales"), "*fp16"),
}
_NUMBERS = ("begin", "end", "width", "rows", "K", "N", "units", "units_per_split", "magic")
_MULTIPLES_OF_16 = ("begin", "end", "width", "K", "N", "units_per_split")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_VECTORS = {"BY_ROW": True, "BY_COLUMN": True, "GROUP": 0}
MEANINGS: dict[str, dict[str, Any]] = {
    "zeros": {"ZEROS": True, "LEVELS": False, "BELOW": False},
    "symmetric": {"ZEROS": False, "LEVELS": False, "BELOW": False},
    "levels": {"ZEROS": False, "LEVELS": True, "BELOW": False},
    "two-sided": {"ZEROS": False, "LEVELS": True, "BELOW": True},
    "states of 10": {"STATE": 10},
    "states of 12": {"STATE": 12},
    "codebooks": {"SELECT": 3, "BYTES": True, "SPAN": 32, "GROUP": 64},
    "levels in 16": {"SELECT": 0, "BYTES": True, "SPAN": 16, "GROUP": 16},
    "vectors of 8": {"LENGTH": 8, "LOG_LENGTH": 3, "CENTROIDS": 256, "RESIDUAL": 0, **_VECTORS},
    "residual vectors of 4": {"LENGTH": 4, "LOG_LENGTH": 2, "CENTROIDS": 64, "RESIDUAL": 64, **_VECTORS},
}
"""What codes can mean: integers with stored zeros or without, levels with one scale or two, states of so many bits,
entries of 8 codebooks in groups of 64, levels in groups of 16; scales of the last two are bytes. Or they are indices of
vectors."""


def kernel_name(kernel: str, meaning: str) -> str:
    """Return which of ``KERNELS`` does what a config names, for codes of a meaning."""
    kinds = {"STATE": "states", "SPAN": "blocks", "LENGTH": "vectors"}
    return next((f"{kind}_{kernel}" for name, kind in kinds.items() if name in MEANINGS[meaning]), kernel)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A kernel for one target; what is counted is the loop over the inputs, or all of a kernel without one."""

    registers: int  # of a thread
    stack: int  # bytes of a thread that lie in memory: spilled registers
    shared: int  # bytes of a program
    opcodes: Counter[str]  # instructions of a thread that go through the loop once
    weights: int  # of a thread in that time
    words: int  # 32-bit words that a thread has of them

    @property
    def per_weight(self) -> float:
        """Instructions for a weight."""
        return self.opcodes.total() / self.weights

    def count(self, *names: str) -> int:
        """Return how many instructions have one of these names, or one that goes on behind it with a dot."""
        return sum(
            number
            for opcode, number in self.opcodes.items()
            if any(opcode == name or opcode.startswith(f"{name}.") for name in names)
        )

    @property
    def wide_loads(self) -> int:
        """Loads of 128 bits from global memory, at once or copied to shared memory meanwhile."""
        loads = ("LDG", "LDGSTS")
        return sum(
            number for opcode, number in self.opcodes.items() if opcode.split(".")[0] in loads and ".128" in opcode
        )

    @property
    def tensor_cores(self) -> int:
        """Instructions of the tensor cores, of whatever generation."""
        return self.count("HMMA", "HGMMA", "UTCHMMA")


def compile_config(
    config: Config, bits: int, meaning: str, capability: int, *, dtype: str = "bf16", group: int = 128
) -> Compiled:
    """Compile a config for a GPU, for inputs and outputs that are multiples of 16 and of the tiles.

    Args:
        config: kernel and tiles.
        bits: of a code.
        meaning: one of ``MEANINGS``.
        capability: of the GPU: 80, 90, 100...
        dtype: of the activations: bf16, fp16 or fp32.
        group: inputs of a group; 0: all.
    """
    kernel = KERNELS[kernel_name(config.kernel, meaning)]
    constants: dict[str, Any] = {"BITS": bits, "PRIMARY": PRIMARY[bits], "GROUP": group, **MEANINGS[meaning]}
    constants |= {"TAIL": False, "EVEN": True, "ROWS": config.rows, "UNITS": config.units, "COLUMNS": config.columns}
    out = f"*{dtype}" if config.kernel == "dense" else "*fp32"
    scales = {"scales": "*u8"} if constants.get("BYTES") else {}
    types = {**_TYPES, **scales, **dict.fromkeys(_NUMBERS, "i32"), "x": f"*{dtype}", "out": out}
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(at,): constants[name] for at, name in enumerate(names) if name in constants},
        attrs={
            (at,): [["tt.divisibility", 16]]
            for at, name in enumerate(names)
            if types.get(name, "").startswith("*") or name in _MULTIPLES_OF_16
        },
    )
    options = {"num_warps": config.warps, "num_stages": config.stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, listing = _disassembled(built.asm["cubin"])
    weights = config.units * config.columns // config.warps
    return Compiled(
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]),
        shared=built.metadata.shared,
        opcodes=Counter(_body(listing)),
        weights=weights,
        words=weights * bits // (UNIT * constants.get("LENGTH", 1)),
    )


def _disassembled(cubin: bytes) -> tuple[dict[str, str], str]:
    """Return the resources that a binary uses by name, and its instructions."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        commands = (["cuobjdump", "--dump-resource-usage"], ["nvdisasm", "-c"])
        usage, listing = (
            subprocess.run(
                [str(tools / command[0]), *command[1:], str(path)], capture_output=True, text=True, check=True
            ).stdout
            for command in commands
        )
    return dict(re.findall(r"([A-Z]+):(\d+)", usage)), listing


def _body(listing: str) -> list[str]:
    """Return the opcodes between the farthest pair of a jump back and its target, or all up to the end."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    longest = (0, 0)
    for line in listing.splitlines():
        if line.startswith(".L_"):
            labels[line.strip().rstrip(":")] = len(opcodes)
        elif found := _INSTRUCTION.search(line):
            opcodes.append(found[1])
            target = re.search(r"(\.L_\w+)", found[2]) if found[1].startswith("BRA") else None
            if target and target[1] in labels:
                longest = max(longest, (len(opcodes) - labels[target[1]], labels[target[1]]))
    length, start = longest
    exits = [at for at, opcode in enumerate(opcodes) if opcode == "EXIT"]
    return opcodes[start : start + length] if length > 1 else opcodes[: exits[-1] + 1]
