"""What the modules of a model do with their parameters, read from their types and from the code of their `forward`."""
