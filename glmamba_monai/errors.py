"""What lies behind an error that a library has wrapped."""

from __future__ import annotations


def root_cause(error: BaseException) -> BaseException:
    """What went wrong behind the ``RuntimeError`` that MONAI wraps, often several times, around an error of a config.

    It is not the last cause: that is what the reader of a damaged file said, say, and does not name the file.
    """
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error
