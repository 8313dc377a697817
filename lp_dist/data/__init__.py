"""Text to train on, and GGUF files to train from."""
