"""The update: the equation, the optimizers and the kernels."""
