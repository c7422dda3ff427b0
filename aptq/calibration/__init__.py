"""The walk over a model's blocks, and the two passes that take it."""
