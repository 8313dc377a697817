"""What `lp-dist bench` runs; its results are in docs/results."""
