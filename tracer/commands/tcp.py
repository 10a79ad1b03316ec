"""`latrace tcp`: which connections send segments again, as it happens and in all."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from latrace.tracer.commands import params
from latrace.tracer.commands.attach import Pid
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
_NOT_NEEDED = frozenset({"causes", "culprits", "interrupts", "sleeps"})

All = Annotated[
    bool,
    typer.Option("-a", "--all", help="Every process of the host; so it is without --pid, too."),
]


def tcp(
    *,
    pid: Pid = None,
    everything: All = False,
    duration: params.Duration = None,
    output: params.Output = None,
    force: params.Force = False,
    as_json: params.Json = False,
    verbose: params.Verbose = False,
    quiet: params.Quiet = False,
) -> None:
    """Show TCP retransmits as they happen, then by connection.

    Needs root. A line for each, whose it is and why it was sent again; at the
    end how many of how many segments, by peer and connection, held against
    the kernel's own counters. With --pid the waits of these processes are
    traced as well, and which of them a loss made longer is told.

    \b
    sudo latrace tcp
    sudo latrace tcp --pid 812 -d 30s
    """
    status = Status(quiet=quiet, verbose=verbose)
    if pid is not None and everything:
        raise UsageError("--pid and --all exclude each other", hint="leave one of them out")
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
    # Before root is given up: the program's own files may be readable to root alone.
    from latrace.analysis.capture import open_capture  # noqa: PLC0415 - heavy, after the trace
    from latrace.analysis.connections import summarise_connections  # noqa: PLC0415
    from latrace.analysis.connections_text import render_connections  # noqa: PLC0415

    give_up_root()
    capture = open_capture(path)
    summary = summarise_connections(capture, top=_TOP_JSON if as_json else _TOP_TEXT)
    if as_json:
        write_out(json.dumps(summary, indent=2, ensure_ascii=True) + "\n")
    else:
        text = render_connections(
            summary, width=width_of(sys.stdout), colour=wants_colour(sys.stdout)
        )
        # What the losses did to the waits of the processes is told here, below the connections.
        write_out(("" if quiet else "\n") + text)
    source = say_size(path, status=status)
    if pid is not None:
        say_next(
            (
                (f"{program()} report{source}", "all their waits for a CPU"),
                (f"{program()} flame{source} --kind offcpu blocked.svg", "where they blocked"),
            ),
            status=status,
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

    def add(self, rows: npt.NDArray[np.void], names: Mapping[int, str], start_ns: int) -> None:
        """Retransmits have come."""
        if self._lines is not None:
            self._lines.add(rows, names, start_ns)

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
