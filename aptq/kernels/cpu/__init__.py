"""Products with packed weights on x86 CPUs: C++ that is built when it is first needed."""

from aptq.kernels.cpu import ops
from aptq.kernels.cpu.build import ARCHITECTURES
from aptq.kernels.cpu.library import FOLDER, TYPES, Library, Turn, kernels_for, load_kernels, read_states

__all__ = [
    "ARCHITECTURES",
    "FOLDER",
    "TYPES",
    "Library",
    "Turn",
    "kernels_for",
    "load_kernels",
    "ops",
    "read_states",
]
