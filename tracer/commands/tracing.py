"""The course of every command that traces: check the host, attach, follow, stop, tell.

Nothing heavy is imported here before the probes are attached.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latrace.analysis.words import size
from latrace.tracer.caller import become, calling_account
from latrace.tracer.commands.console import (
    Status,
    from_here,
    program,
    wants_colour,
    width_of,
    write_out,
)
from latrace.tracer.commands.quantities import show_seconds
from latrace.tracer.commands.signals import StopOnSignals
from latrace.tracer.errors import LatraceError
from latrace.tracer.live import make_view
from latrace.tracer.options import Options
from latrace.tracer.outputs import DEFAULT_NAME, OutputDir, create_output_dir

if TYPE_CHECKING:
    from latrace.tracer.session import OnRetransmits, Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One trace: what, for whom, and what to say."""

    options: Options
    output: Path | None
    force: bool
    description: str
    """What is traced, safe to print."""
    redraw: bool = True
    """Whether the terminal is ours alone, so that the live view may redraw it."""


def trace(
    plan: Plan,
    *,
    status: Status,
    signals: StopOnSignals,
    on_attached: Callable[[], None] | None = None,
    on_tick: Callable[[Snapshot], None] | None = None,
    on_retransmits: OnRetransmits | None = None,
) -> Path:
    """Trace as planned until a signal, the duration or the targets' end.

    Returns the capture's path, relative to the working directory if it is below that: the user may
    not be able to walk down to it from the root.

    `signals` must be active. `on_attached` is called when the probes are in place, `on_retransmits`
    with each batch of them. Raises `HostError` when this host or this user can not trace.
    """
    # Late: what doctor imports is not needed for --help, and errors come before the compiler.
    from latrace.tracer.doctor import explained, require_tracing  # noqa: PLC0415

    began_s = time.monotonic()
    require_tracing()
    made: list[OutputDir] = []

    def make_output() -> OutputDir:
        made.append(create_output_dir(plan.output, force=plan.force))
        return made[-1]

    with explained():
        from latrace.tracer.loader import Loading  # noqa: PLC0415

        loading = Loading(plan.options)
        from latrace.tracer.session import Tracer  # noqa: PLC0415

        tracer = Tracer(plan.options, make_output, command=sys.argv, loading=loading)
        tracer.__enter__()
    view = make_view(status, redraw=plan.redraw)

    def tick(snapshot: Snapshot) -> None:
        view.update(snapshot)
        if on_tick is not None:
            on_tick(snapshot)

    try:
        status.say(_header(plan))
        status.detail(f"  attached {time.monotonic() - began_s:.2f} s after the checks began")
        if on_attached is not None:
            on_attached()
        tracer.run(stop=signals.stop, on_tick=tick, on_retransmits=on_retransmits)
    finally:
        view.close()
        tracer.__exit__(*sys.exc_info())
    return from_here(made[-1].path)


def _header(plan: Plan) -> str:
    duration = plan.options.duration_s
    limit = f" for {show_seconds(duration)}" if duration is not None else ""
    return f"Tracing {plan.description}{limit}. Hit Ctrl-C to end."


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of the capture at `path`: the fields of `latrace report --json`."""
    from latrace.analysis.capture import open_capture  # noqa: PLC0415
    from latrace.analysis.summary import summarise  # noqa: PLC0415

    return summarise(open_capture(path))


def give_up_root() -> None:
    """After the trace: go on as the user who typed sudo, whom the capture belongs to.

    What reads the capture parses names and tables that others may have had a hand in.
    """
    # Before the change: the program's own files may be readable to root alone (a checkout).
    import latrace.analysis.summary  # noqa: PLC0415
    import latrace.analysis.text  # noqa: F401, PLC0415

    become(calling_account())


def print_summary(summary: dict[str, Any], *, as_json: bool) -> None:
    """The report on stdout: in words, or as one JSON document."""
    if as_json:
        text = json.dumps(summary, indent=2, ensure_ascii=True)
    else:
        from latrace.analysis.text import render_text  # noqa: PLC0415

        text = render_text(
            summary, width=width_of(sys.stdout), colour=wants_colour(sys.stdout)
        ).rstrip("\n")
    write_out(text + "\n")


def say_written(path: Path, *, status: Status) -> None:
    """The last lines of a run: what was written, and what to do with it."""
    source = say_size(path, status=status)
    say_next(
        (
            (f"{program()} flame{source} wait.svg", "where it waited, as a picture"),
            (f"{program()} flame{source} --kind culprit who.svg", "who had the CPU"),
            (f"{program()} report{source} -o report.html", "all of it, with plots"),
        ),
        status=status,
    )


def say_size(path: Path, *, status: Status) -> str:
    """What was written; returns how other commands are told to read it, with a leading space."""
    status.say(f"Wrote {path} ({size_of(path)})")
    return "" if path == Path(DEFAULT_NAME) else f" -i {shlex.quote(str(path))}"


def say_next(commands: Sequence[tuple[str, str]], *, status: Status) -> None:
    """What to type next, each command with what it does, if both fit on the line."""
    columns = max(len(command) for command, _ in commands) + 2
    room = width_of(status.stream) - len("Next: ") - columns
    for number, (command, does) in enumerate(commands):
        told = f"{command:<{columns}}{does}" if len(does) <= room else command
        status.say(f"{'Next: ' if number == 0 else '      '}{told}")


def size_of(path: Path) -> str:
    """How large the capture at `path` is, in words. Raises `LatraceError` when it is gone."""
    try:
        return size(sum(entry.stat().st_size for entry in path.iterdir()))
    except OSError as error:
        raise LatraceError(
            f"the capture {path} can not be read back: {error.strerror}",
            hint="was it moved or removed while latrace wrote it?",
        ) from error
