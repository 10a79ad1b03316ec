"""The command line: one entry point, one place where errors become words and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from latrace.tracer.errors import LatraceError

_EXIT_FAILED, _EXIT_USAGE = 1, 2
_TYPERS_INTERRUPTED = 130  # what it makes of a KeyboardInterrupt


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` and return the exit code.

    Without `args` it is the process's own, and the process is called `latrace` from then on.
    """
    _open_closed_streams()
    if args is None:
        _take_our_name()
    try:
        code = _run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output had enough
        from latrace.tracer.commands.console import silence_stdout  # noqa: PLC0415

        silence_stdout()
        return _EXIT_FAILED
    except KeyboardInterrupt:
        return _fail("interrupted", "")
    return code


def _run(args: Sequence[str] | None) -> int:
    # Imported here so that Ctrl-C during the imports is as quiet as at any other time.
    import typer  # noqa: PLC0415
    from typer.main import get_command  # noqa: PLC0415

    from latrace.analysis.errors import CaptureError  # noqa: PLC0415
    from latrace.tracer.commands.application import app  # noqa: PLC0415

    try:
        result = get_command(app).main(
            args=None if args is None else list(args), prog_name="latrace", standalone_mode=False
        )
    except (LatraceError, CaptureError) as error:
        return _fail(error.cause, error.hint, error.exit_code)
    except typer.TyperException as error:
        # What typer itself finds wrong with the command line.
        context = getattr(error, "ctx", None)
        called = context.command_path if context else "latrace"
        return _fail(error.format_message(), f"{called} --help shows what it takes", _EXIT_USAGE)
    if result == _TYPERS_INTERRUPTED:
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def _fail(cause: str, hint: str, code: int = _EXIT_FAILED) -> int:
    text = f"latrace: {cause}\n" + (f"  hint: {hint}\n" if hint else "")
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):  # nobody listens; the exit code tells
        pass
    return code


def _take_our_name() -> None:
    """Be `latrace` in `ps` and in lists of culprits, not the interpreter."""
    with suppress(OSError):
        comm = os.open("/proc/self/comm", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(comm, b"latrace")
        finally:
            os.close(comm)


def _open_closed_streams() -> None:
    """Give closed standard streams a sink, so that no opened file becomes one of them."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
