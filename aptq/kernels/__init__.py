"""Native code that multiplies packed weights."""
