"""The one expected failure of the analysis: a capture that cannot be read."""

from __future__ import annotations

from pathlib import Path


class CaptureError(Exception):
    """A capture is missing, damaged or newer than this program.

    `cause` is one line that says what is wrong; `hint` says what to type or do next.
    """

    exit_code = 1

    def __init__(self, cause: str, *, hint: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.hint = hint


def unreadable(file: Path, error: OSError) -> CaptureError:
    """What to raise when the system does not let us read a file of a capture."""
    why = (error.strerror or str(error)).lower()
    hint = "it belongs to the user who recorded it" if isinstance(error, PermissionError) else ""
    return CaptureError(f"cannot read {file}: {why}", hint=hint)


def damaged(
    file: Path,
    why: str,
    *,
    hint: str = "record again; a capture cut off by a kill would have been readable",
) -> CaptureError:
    """What to raise when a file is not what latrace writes; of `why` the first line is told."""
    first_line = why.strip().splitlines()[0] if why.strip() else "unreadable"
    return CaptureError(f"{file} is damaged: {first_line}", hint=hint)
