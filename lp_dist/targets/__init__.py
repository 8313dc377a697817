"""A sparsity instead of a λ."""
