"""What a step of the optimizer costs."""
