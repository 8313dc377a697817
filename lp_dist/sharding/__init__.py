"""Where a parameter lies: the one place that knows DeepSpeed, FSDP2 and DTensor."""
