"""Weights on disk in any form, read one tensor at a time. Each module names the source of the format that it reads."""
