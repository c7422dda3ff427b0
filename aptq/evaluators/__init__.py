"""What a result is judged by."""
