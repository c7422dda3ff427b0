"""Curvatures that rounding errors are weighed with: one file a component."""
