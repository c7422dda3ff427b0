"""Decoding one token after another by a step of the model that is captured once."""

from aptq.decoding.capture import Captured, capture
from aptq.decoding.decoder import Decoder

__all__ = ["Captured", "Decoder", "capture"]
