"""`latrace tcp`: which connections send segments again, as it happens and in all."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latrace.tracer.commands import params
from latrace.tracer.commands.console import Status, program, wants_colour, width_of, write_out
from latrace.tracer.commands.quantities import parse_run_time
from latrace.tracer.commands.signals import StopOnSignals
from latrace.tracer.commands.tracing import Plan, give_up_root, say_next, say_size, trace
from latrace.tracer.errors import LatraceError, UsageError
from latrace.tracer.live import RetransmitLines
from latrace.tracer.options import Options
from latrace.tracer.targets import Request, parse_ids, resolve

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_TOP_TEXT, _TOP_JSON = 10, 1000
_LENGTHENED = ("lengthened_count", "lengthened_ns", "blocked_ns", "weak_count", "lengthened")
"""What `latrace report --json` has in `retransmits`, too."""
_NOT_NEEDED = frozenset({"causes", "culprits", "interrupts", "sleeps"})

All = Annotated[
    bool,
    typer.Option("-a", "--all", help="Every process of the host, as without --pid."),
]

Source = Annotated[
    Path | None,
    typer.Option("-i", "--input", metavar="DIR", help="Trace nothing: tell it of this capture."),
]


def tcp(
    *,
    pid: params.Pid = None,
    everything: All = False,
    duration: params.Duration = None,
    output: params.Output = None,
    force: params.Force = False,
    source: Source = None,
    as_json: params.Json = False,
    verbose: params.Verbose = False,
    quiet: params.Quiet = False,
) -> None:
    """Show TCP retransmits as they happen, then by connection.

    Needs root. A line for each, whose it is and why it was sent again; at the
    end how many of how many segments, by peer and connection, held against
    the kernel's own counters. With --pid the waits of these processes are
    traced as well, and which of them a loss made longer is told. With --input
    it tells all this of a capture; that needs no root.

    \b
    sudo latrace tcp
    sudo latrace tcp --pid 812 -d 30s
    latrace tcp -i latrace.data
    """
    status = Status(quiet=quiet, verbose=verbose)
    if pid is not None and everything:
        raise UsageError("--pid and --all exclude each other", hint="leave one of them out")
    if source is not None:
        if pid is not None or everything or duration or output or force:
            raise UsageError(
                "--input reads a capture, and the other options are for making one",
                hint=f"only --json goes with it: {program()} tcp -i {shlex.quote(str(source))}",
            )
        _report(source, as_json=as_json)
        return
    with StopOnSignals() as signals:
        options = Options(
            all_sockets=True,
            stacks=False,
            cpu_samples_hz=0,
            without=_NOT_NEEDED,
            duration_s=None if duration is None else parse_run_time(duration),
        )
        description = "the TCP sockets of all processes"
        if pid is not None:
            targets = resolve(Request(pids=parse_ids(pid, option="--pid")))
            for note in targets.notes:
                status.say(f"Note: {note}.")
            description = f"{targets.description} and its TCP sockets"
            options = replace(
                options, all_sockets=False, must_see_tcp=True, stacks=True, pids=targets.pids
            )
        # Below the lines there is no room for a live view of the terminal.
        plan = Plan(
            options=options, output=output, force=force, description=description, redraw=False
        )
        lines = _Lines(signals, silent=as_json or quiet)
        path = trace(
            plan,
            status=status,
            signals=signals,
            on_attached=lines.begin,
            on_tick=lambda _snapshot: lines.update(),
            on_retransmits=lines.add,
        )
        lines.close()
    _import_analysis()
    give_up_root()
    if not as_json and not quiet:
        write_out("\n")
    _report(path, as_json=as_json)
    read = say_size(path, status=status)
    if pid is None:
        again = f"{program()} tcp -i {shlex.quote(str(path))}"
        commands = [(again, "the same once more; needs no root")]
    else:
        commands = [
            (f"{program()} report{read}", "all waits for a CPU, too"),
            (f"{program()} flame{read} --kind offcpu blocked.svg", "where it was blocked"),
        ]
    say_next(commands, status=status)


def _import_analysis() -> None:
    """Import it while root: the program's own files may be readable to nobody else."""
    import latrace.analysis.capture  # noqa: PLC0415 - heavy, after the trace
    import latrace.analysis.connections  # noqa: PLC0415
    import latrace.analysis.connections_text  # noqa: PLC0415
    import latrace.analysis.retransmits  # noqa: PLC0415
    import latrace.analysis.retransmits_text  # noqa: F401, PLC0415


def _report(path: Path, *, as_json: bool) -> None:
    """The connections of a capture on stdout, and below them what the losses did to the waits."""
    from latrace.analysis.capture import open_capture  # noqa: PLC0415
    from latrace.analysis.connections import summarise_connections  # noqa: PLC0415
    from latrace.analysis.connections_text import render_connections  # noqa: PLC0415
    from latrace.analysis.retransmits import (  # noqa: PLC0415
        read_retransmits,
        summarise_retransmits,
    )
    from latrace.analysis.retransmits_text import lengthened_text  # noqa: PLC0415

    capture = open_capture(path)
    connections = summarise_connections(capture, top=_TOP_JSON if as_json else _TOP_TEXT)
    waits = summarise_retransmits(read_retransmits(capture))
    if as_json:
        told = connections | {name: waits[name] for name in _LENGTHENED}
        write_out(json.dumps(told, indent=2, ensure_ascii=True) + "\n")
        return
    width, colour = width_of(sys.stdout), wants_colour(sys.stdout)
    write_out(
        render_connections(connections, width=width, colour=colour)
        + lengthened_text(waits, width=width, colour=colour)
    )


class _Lines:
    """The live lines on stdout. When nobody takes them any more, the trace ends in order."""

    def __init__(self, signals: StopOnSignals, *, silent: bool) -> None:
        self._stop = signals.stop
        self._lines = None if silent else RetransmitLines(self._write)
        self._error: LatraceError | BrokenPipeError | None = None

    def begin(self) -> None:
        """The probes are attached."""
        if self._lines is not None:
            self._lines.begin()

    def add(self, rows: npt.NDArray[np.void], start_ns: int) -> None:
        """Retransmits have come."""
        if self._lines is not None:
            self._lines.add(rows, start_ns)

    def update(self) -> None:
        """Some time has passed."""
        if self._lines is not None:
            self._lines.update()

    def close(self) -> None:
        """The trace is over. Raises what ended it: `BrokenPipeError`, `LatraceError`."""
        if self._lines is not None:
            self._lines.close()
        if self._error is not None:
            raise self._error

    def _write(self, text: str) -> None:
        if self._error is not None:
            return
        try:
            write_out(text)
        except (BrokenPipeError, LatraceError) as error:
            self._error = error
            self._stop.set()
