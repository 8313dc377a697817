"""What is trained on and from: text, and GGUF files."""
