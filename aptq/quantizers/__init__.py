"""How codes are chosen: one file a component."""
