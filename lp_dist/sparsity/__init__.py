"""Which weights count, and how many of them are zero, over all ranks."""
