"""Training with Hugging Face's Trainer: the callback, the trainer and the program."""
