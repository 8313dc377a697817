"""What each way to sparsity loses, with the same data, tokens, seeds and evaluation."""
