"""Decoding one token after another by a step of the model that is captured once."""

from aptq.decoding.capture import Traced, trace
from aptq.decoding.decoder import Decoder

__all__ = ["Decoder", "Traced", "trace"]
