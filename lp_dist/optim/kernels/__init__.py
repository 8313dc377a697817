"""The fused step: the base's step and the decay in one pass over memory."""
