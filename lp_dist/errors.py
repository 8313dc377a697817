"""Errors that a command prints in one line, without a traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UsageError(ValueError):
    """Bad input by the user. The message names the value, the limit and what to do instead."""


class DiffersError(RuntimeError):
    """A file that was read back differs from what was written to it."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, as part of a line: some add pages to it."""
    return printable((str(error).strip().splitlines() or [""])[0]) or type(error).__name__


@contextmanager
def in_one_line(what: str, way_out: str) -> Iterator[None]:
    """Within it whatever a reader raises for what it did not expect in a file becomes a UsageError of one line.

    Args:
        what: the start of the line, up to "ended with", which the name of the error follows.
        way_out: the end of the line.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # of any library, which each raise what they like for a file that is damaged
        raise UsageError(f"{what} {type(error).__name__} ({first_line(error)}); {way_out}") from error


def printable(text: str) -> str:
    """With what a terminal would take for a command, such as names in a damaged file may hold, as it is escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """An error message of the library in the words of the command line: `cap=0.5` becomes `--cap 0.5`.

    Args:
        message: names arguments as `name=value`; all else stays as it is. So do arguments of a call, as in f(cap=2).
        flags: the flag of each argument that the command has, such as {"lr": "--learning_rate"}.
    """

    def to_flag(match: re.Match[str]) -> str:
        name, _, value = match.groups()
        return f"{flags[name]} {value or ''}" if name in flags else match[0]

    return re.sub(r"""(?<!\w\()(?<![\w.`'"-])(\w+)=(?:(['"])([^'"]*)\2|(?=[\w.+-]))""", to_flag, message)
