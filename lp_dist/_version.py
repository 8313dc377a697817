"""The version, in a module of its own so that the package can import it."""

__version__ = "0.1.0"
