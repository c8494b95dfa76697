"""Errors a user can act on."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend; the message says what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()
