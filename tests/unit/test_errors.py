"""Errors name arguments, and a command line gives them the names of its flags."""

from __future__ import annotations

import pytest

from lp_dist.errors import first_line, printable, with_flags

FLAGS = {"lr": "--learning_rate", "cap": "--cap", "scope": "--scope"}


@pytest.mark.parametrize(
    "message, in_flags",
    [
        ("lr=-1.0 must be >= 0", "--learning_rate -1.0 must be >= 0"),
        ("take one threshold (scope='global')", "take one threshold (--scope global)"),
        ("scope='' and cap=None", "--scope  and --cap None"),
        ("p=5 and lr=1e-3, cap=2", "p=5 and --learning_rate 1e-3, --cap 2"),
        ("attach(lr=1) or group.cap=1 or `scope=1`", "attach(lr=1) or group.cap=1 or `scope=1`"),
        ("--cap 2 stays, and so does values={...}", "--cap 2 stays, and so does values={...}"),
    ],
)
def test_arguments_become_flags(message, in_flags):
    assert with_flags(message, FLAGS) == in_flags


def test_only_the_first_line_of_a_librarys_error_is_told_and_nothing_that_a_terminal_obeys():
    assert first_line(RuntimeError("\n no such key\nand pages more")) == "no such key"
    assert first_line(KeyError()) == "KeyError"
    assert printable("a\x1b[2Jb\r\n\u202ec é λ") == r"a\x1b[2Jb\r\n\u202ec é λ"
