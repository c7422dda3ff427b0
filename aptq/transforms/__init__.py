"""Transforms: the basis in which weights are rounded."""
