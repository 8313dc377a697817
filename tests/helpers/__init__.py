"""Shared by the tests: engines, models, runs, oracles, and where the project is."""
