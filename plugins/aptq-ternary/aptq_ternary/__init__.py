"""A ternary weight format for aptq."""
