"""What a layer is expected to cost at each option: one file a component."""
