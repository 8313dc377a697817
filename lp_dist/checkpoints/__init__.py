"""Weights on disk in any form, read one tensor at a time; each module names the source of the format that it reads."""
