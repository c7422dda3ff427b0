"""What codes mean: one file a component."""
