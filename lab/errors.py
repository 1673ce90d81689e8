"""Errors that a person is meant to read.

Every failure the laboratory foresees is a LabError: what failed, with what,
and what to do about it. Anything else that reaches the user is a bug in the
laboratory and keeps its traceback.
"""

from __future__ import annotations


class LabError(Exception):
    """A foreseen failure. `hint` says what to do next; the command exits 1."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(LabError):
    """The command line asks for something that does not exist; exits 2."""

    exit_code = 2
