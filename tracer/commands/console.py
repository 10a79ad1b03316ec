"""Status to stderr, data to stdout; a stream that is closed or gone never costs a capture."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TextIO

from latrace.tracer.errors import LatraceError

_USUAL_WIDTH = 80
_MIN_WIDTH = 40


class Status:
    """Words about the run, on stderr. `quiet` leaves only warnings; `verbose` adds details."""

    def __init__(
        self, *, quiet: bool = False, verbose: bool = False, stream: TextIO | None = None
    ) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self.stream = sys.stderr if stream is None else stream

    def say(self, text: str) -> None:
        """Print a line, unless quiet."""
        if not self.quiet:
            self._write(text)

    def detail(self, text: str) -> None:
        """Print a line if verbose."""
        if self.verbose and not self.quiet:
            self._write(text)

    def warn(self, text: str) -> None:
        """Print a line in any case."""
        self._write(text)

    def write(self, text: str) -> None:
        """Write `text` as it is, and let it be seen at once."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # the terminal was closed; the trace goes on
            pass

    def _write(self, text: str) -> None:
        self.write(text + "\n")


def write_out(data: str | bytes) -> None:
    """Write the answer to stdout.

    Raises `BrokenPipeError` when its reader had enough, `LatraceError` when it can not be written.
    """
    raw = data.encode(sys.stdout.encoding, "backslashreplace") if isinstance(data, str) else data
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(raw)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        silence_stdout()
        raise LatraceError(
            f"can not write to standard output: {error.strerror}", hint="is the disk full?"
        ) from error


def silence_stdout() -> None:
    """Keep the interpreter from complaining about unwritten output when it ends."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.close(sink)


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can move its cursor."""
    try:
        return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    except ValueError:  # closed
        return False


def wants_colour(stream: TextIO) -> bool:
    """Whether to use colours on `stream` (https://no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def columns_of(stream: TextIO) -> int:
    """How wide the terminal behind `stream` is now: at least 2; 80 where that is not known."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return _USUAL_WIDTH
    return max(2, columns) if columns else _USUAL_WIDTH  # 0: it does not know either


def width_of(stream: TextIO) -> int:
    """Columns to fill on `stream`: 80, or fewer on a narrow terminal."""
    return max(_MIN_WIDTH, min(_USUAL_WIDTH, columns_of(stream)))


def program() -> str:
    """How to call latrace again as it was called now: by its name if the PATH has it."""
    found = shutil.which("latrace")
    called = Path(sys.argv[0])
    by_path = called.name == "latrace" and os.sep in sys.argv[0]
    if not by_path or (found and Path(found).resolve() == called.resolve()):
        return "latrace"
    return shlex.quote(str(called.absolute()))


def command_line() -> str:
    """The present command as one can type it again."""
    return shlex.join([program(), *sys.argv[1:]])


def from_here(path: Path) -> Path:
    """How to name `path` to who typed the command: relative, if it is in the working directory."""
    try:
        return path.relative_to(Path.cwd())
    except (ValueError, OSError):  # elsewhere, or the working directory is gone
        return path
