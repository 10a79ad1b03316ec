"""The one expected failure of the analysis: a capture that cannot be read."""

from __future__ import annotations


class CaptureError(Exception):
    """A capture is missing, damaged or newer than this program.

    `cause` is one line that says what is wrong; `hint` says what to type or do next.
    """

    exit_code = 1

    def __init__(self, cause: str, *, hint: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.hint = hint
