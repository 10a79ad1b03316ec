"""`latrace flame`: a capture as a flame graph, a folded file or a speedscope profile."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from latrace.analysis.words import size
from latrace.tracer.commands import params
from latrace.tracer.commands.console import Status, write_out
from latrace.tracer.errors import UsageError
from latrace.tracer.outputs import DEFAULT_NAME, open_output_file


class Kind(StrEnum):
    """What the widths of a flame graph are."""

    wait = "wait"
    offcpu = "offcpu"
    culprit = "culprit"
    waker = "waker"
    wall = "wall"


class Format(StrEnum):
    """What a flame graph is written as."""

    svg = "svg"
    folded = "folded"
    speedscope = "speedscope"


_EXTENSIONS = {
    Format.svg: ".svg",
    Format.folded: ".folded",
    Format.speedscope: ".speedscope.json",
}

Out = Annotated[
    str,
    typer.Argument(
        metavar="OUT",
        help="The file to write; .svg, .folded or .speedscope.json chooses the format."
        " - is stdout (folded unless --format says otherwise).",
        show_default=False,
    ),
]


def flame(
    *,
    out: Out,
    source: params.Input = Path(DEFAULT_NAME),
    kind: Annotated[
        Kind, typer.Option("--kind", help="What the widths are; see above.")
    ] = Kind.wait,
    fmt: Annotated[
        Format | None, typer.Option("--format", help="The format, whatever OUT is called.")
    ] = None,
    force: params.Force = False,
    quiet: params.Quiet = False,
) -> None:
    """Draw where the threads waited, and for whom, as a flame graph.

    Reads a capture; needs no root.

    \b
    --kind wait     where a thread left the CPU before it waited to run again,
                    by the cause of the wait
    --kind culprit  who ran while it waited, and what they were doing
    --kind offcpu   the first for all time off the CPU, blocked and waiting apart
    --kind wall     the same, and what the threads did on the CPU beside it
    --kind waker    who ended the blocked time, below the thread that was blocked

    Widths are time in microseconds; what was not sampled stands beside.

    \b
    latrace flame wait.svg
    latrace flame --kind culprit who.svg
    latrace flame --kind offcpu - | flamegraph.pl --countname=us > out.svg
    """
    status = Status(quiet=quiet)
    chosen = fmt or _format_of(out)
    from latrace.analysis.capture import open_capture  # noqa: PLC0415
    from latrace.flamegraphs import build_profile, render  # noqa: PLC0415

    data = render(build_profile(open_capture(source), kind=kind.value), _EXTENSIONS[chosen])
    if out == "-":
        write_out(data)
        return
    path = Path(out)
    with open_output_file(path, force=force) as stream:
        stream.write(data)
    status.say(f"Wrote {path} ({size(len(data))})")
    if chosen is Format.svg:
        status.say("Next: open it in a browser; click zooms, Ctrl-F searches")
    elif chosen is Format.speedscope:
        status.say("Next: open it on https://www.speedscope.app (it stays in your browser)")


def _format_of(out: str) -> Format:
    if out == "-":
        return Format.folded
    for fmt, extension in _EXTENSIONS.items():
        if out.lower().endswith(extension):
            return fmt
    raise UsageError(
        f"the name {out} does not tell the format",
        hint="end it in .svg, .folded or .speedscope.json, or give --format",
    )
