"""Models as the pipeline sees them: blocks with named linear layers, streamed from disk one block at a time."""

from aptq.models.experts import Expert, UnfusedExperts, unfuse_experts
from aptq.models.source import ModelSource, open_model
from aptq.models.structure import Conv1DLayer, LinearLayer, find_blocks, find_layers

__all__ = [
    "Conv1DLayer",
    "Expert",
    "LinearLayer",
    "ModelSource",
    "UnfusedExperts",
    "find_blocks",
    "find_layers",
    "open_model",
    "unfuse_experts",
]
