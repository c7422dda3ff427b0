"""Which option each layer gets: one file a component."""
