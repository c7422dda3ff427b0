"""What quantizes a layer's inputs: each component a file of its own."""
