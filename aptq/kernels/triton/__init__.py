"""Products with packed weights on GPUs, in Triton, which is imported when the first one is computed."""

from aptq.kernels.triton import ops
from aptq.kernels.triton.configs import read_table

__all__ = ["ops", "read_table"]
