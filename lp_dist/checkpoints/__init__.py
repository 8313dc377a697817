"""Weights on disk in any form, read one tensor at a time."""
