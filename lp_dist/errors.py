"""What a user did wrong, in one sentence: the programs print it without a traceback."""


class UsageError(ValueError):
    """Bad input to a program; the message names the value, the limit and the way out."""
