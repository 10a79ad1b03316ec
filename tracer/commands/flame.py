"""`latrace flame`: a capture as a flame graph, folded stacks, a speedscope or pprof profile."""

from __future__ import annotations

import re
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latrace.analysis.words import size, visible
from latrace.tracer.commands import params
from latrace.tracer.commands.console import Status, write_out
from latrace.tracer.errors import UsageError
from latrace.tracer.outputs import DEFAULT_NAME, open_output_file

if TYPE_CHECKING:
    from latrace.flamegraphs import Shape


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
    pprof = "pprof"


EXTENSIONS = {
    Format.svg: ".svg",
    Format.folded: ".folded",
    Format.speedscope: ".speedscope.json",
    Format.pprof: ".pb.gz",
}

Out = Annotated[
    str,
    typer.Argument(
        metavar="OUT",
        help="The file to write; .svg, .folded, .speedscope.json or .pb.gz (pprof) chooses"
        " the format."
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
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="REGEX",
            help="Only stacks with a frame whose name this finds (a regular expression of Python);"
            " the others' time is one frame, [not matched]. May be repeated: one must match.",
        ),
    ] = None,
    hide: Annotated[
        list[str] | None,
        typer.Option(
            "--hide",
            metavar="REGEX",
            help="Leave out frames whose name this finds; their time goes to their callers. May be"
            " repeated.",
        ),
    ] = None,
    collapse: Annotated[
        bool,
        typer.Option(
            "--collapse",
            help="Fold recursion: f f f is f, f g f g is f g. And take away what every program of a"
            " runtime has: the start-up of libc and its threads, the entry and scheduler functions"
            " of Go, the entries of V8 and libuv (Node.js), the evaluation loop of CPython, the"
            " ways into the kernel and to its scheduler. Never a program's innermost function.",
        ),
    ] = False,
    reverse: Annotated[
        bool,
        typer.Option(
            "--reverse",
            help="Leaf first: from the functions where threads stood, out to their callers; process"
            " and cause come last.",
        ),
    ] = False,
    per_thread: Annotated[
        bool,
        typer.Option(
            "--per-thread",
            help="A first level of threads, comm/tid, in place of processes. What was not sampled"
            " is nobody's. With --kind culprit: the threads that ran.",
        ),
    ] = False,
    merge_threads: Annotated[
        bool,
        typer.Option(
            "--merge-threads",
            help="No level of processes: all threads together. With --kind culprit: processes of"
            " one name together. Without either option, processes of one name are one, and with"
            " --kind culprit each stands alone.",
        ),
    ] = False,
    inlines: Annotated[
        bool,
        typer.Option(
            "--inlines",
            help="Show functions that the compiler inlined as frames of their own, where DWARF"
            " tells of them: in the file itself, if it is still the same build, or in its debug"
            " file under /usr/lib/debug.",
        ),
    ] = False,
    short_names: Annotated[
        bool,
        typer.Option(
            "--short-names",
            help="Names of C++, Rust and Go without parameters, template and generic arguments, and"
            " folders of packages; functions that then have one name are one.",
        ),
    ] = False,
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

    Widths are time in microseconds (pprof: nanoseconds); what was not sampled
    stands beside. No option changes the whole.

    \b
    latrace flame wait.svg
    latrace flame --kind culprit who.svg
    latrace flame wait.pb.gz && go tool pprof -top wait.pb.gz
    latrace flame --kind offcpu - | flamegraph.pl --countname=us > out.svg
    latrace flame --only 'read|write' --hide '^std::' --reverse io.svg
    latrace flame --inlines --short-names code.svg
    """
    status = Status(quiet=quiet)
    chosen = fmt or _format_of(out)
    if per_thread and merge_threads:
        raise UsageError(
            "--per-thread and --merge-threads exclude each other",
            hint="give one of them, or neither for a level of processes",
        )
    if chosen is Format.pprof and out == "-" and sys.stdout.isatty():
        raise UsageError(
            "a pprof profile is not for a terminal", hint="name a file, or lead it to a program"
        )
    from latrace.analysis.capture import open_capture  # noqa: PLC0415
    from latrace.flamegraphs import SlowPatternError, build_profile, render  # noqa: PLC0415
    from latrace.tracer.symbols.later import look_up  # noqa: PLC0415

    shape = _shape(only=only or [], hide=hide or [], collapse=collapse, reverse=reverse)
    capture = open_capture(source)
    found = look_up(capture, inlines=inlines)
    capture.name_frames(found.names)
    for line in found.told:
        status.warn(f"!!! {visible(line)}")
    try:
        profile = build_profile(
            capture,
            kind=kind.value,
            level="thread" if per_thread else "none" if merge_threads else "process",
            shape=shape,
            inlined=found.inlined,
            short_names=short_names,
        )
    except SlowPatternError as error:
        raise UsageError(
            visible(str(error)),
            hint="it may repeat what is repeated already, as (a+)+ does: say it in a simpler way",
        ) from error
    data = render(profile, EXTENSIONS[chosen])
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
    elif chosen is Format.pprof:
        status.say(f"Next: go tool pprof -top {shlex.quote(str(path))}")


def _shape(*, only: list[str], hide: list[str], collapse: bool, reverse: bool) -> Shape:
    from latrace.flamegraphs import BadPatternError, Shape  # noqa: PLC0415

    for option, patterns in (("--only", only), ("--hide", hide)):
        for pattern in patterns:
            try:
                Shape(only=[pattern])
            except BadPatternError as error:
                raise UsageError(
                    f"{option} '{visible(pattern)}' is not a regular expression: {error}",
                    hint="to find that very text: "
                    f"{option} {visible(shlex.quote(re.escape(pattern)))}",
                ) from error
    return Shape(only=only, hide=hide, collapse=collapse, reverse=reverse)


def _format_of(out: str) -> Format:
    if out == "-":
        return Format.folded
    for fmt, extension in EXTENSIONS.items():
        if out.lower().endswith(extension):
            return fmt
    raise UsageError(
        f"the name {out} does not tell the format",
        hint="end it in .svg, .folded, .speedscope.json or .pb.gz, or give --format",
    )
