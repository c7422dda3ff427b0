"""What multiplies packed weights, and how one is chosen."""
