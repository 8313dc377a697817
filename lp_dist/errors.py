"""What the programs print in one sentence, without a traceback."""


class UsageError(ValueError):
    """Bad input to a program; the message names the value, the limit and the way out."""


class DiffersError(RuntimeError):
    """What was read back is not what was to be written."""
