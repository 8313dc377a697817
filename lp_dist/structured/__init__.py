"""Groups of weights that are pruned together: channels, attention heads, or what a user describes."""
