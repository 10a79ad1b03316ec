"""The one tree of expected failures: each has a cause, a remedy and the contract's exit code.

Anything that is not a `LatraceError` reaching the command line is a bug and shows its traceback.
"""

from __future__ import annotations


class LatraceError(Exception):
    """A failure the user can act on.

    `cause` is one line that says what happened and why; `hint` says what to type or do next.
    """

    exit_code = 1

    def __init__(self, cause: str, *, hint: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.hint = hint


class UsageError(LatraceError):
    """The command line asks for something that cannot be (exit 2)."""

    exit_code = 2


class HostError(LatraceError):
    """A privilege or a kernel feature is missing on this host (exit 3)."""

    exit_code = 3


class NoTargetError(LatraceError):
    """The target did not exist when we attached (exit 4)."""

    exit_code = 4


class BudgetError(LatraceError):
    """A gate was exceeded (exit 5)."""

    exit_code = 5
