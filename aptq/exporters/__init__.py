"""What is written to disk, and who loads it."""
