"""Models written for others: plain, as a bitmask, shrunk, or merged with an adapter."""
