"""`latrace diff`: two captures side by side, in words, as JSON or as a flame graph."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from latrace.analysis.words import size
from latrace.tracer.commands import params
from latrace.tracer.commands.console import Status, wants_colour, width_of, write_out
from latrace.tracer.commands.flame import Kind
from latrace.tracer.errors import LatraceError, UsageError
from latrace.tracer.outputs import open_output_file

Before = Annotated[
    Path, typer.Argument(metavar="A", help="The capture to compare with.", show_default=False)
]
After = Annotated[
    Path, typer.Argument(metavar="B", help="The capture to compare.", show_default=False)
]
Picture = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE.svg",
        help="Draw a flame graph of both instead: red is more in B, blue less. - is stdout.",
    ),
]


def diff(
    *,
    before: Before,
    after: After,
    out: Picture = None,
    kind: Annotated[
        Kind, typer.Option("--kind", help="What the flame graph shows, as in latrace flame.")
    ] = Kind.wait,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the comparison as JSON, for machines.")
    ] = False,
    force: params.Force = False,
    quiet: params.Quiet = False,
) -> None:
    """Compare two captures, and tell which differences are noise.

    How long the waits were, by what and by whom, each with its interval;
    times are per second of the capture. Needs no root.

    \b
    latrace diff before.data after.data
    latrace diff before.data after.data -o diff.svg --kind culprit
    """
    if out is not None:
        _check_picture(out, as_json=as_json)
    from latrace.analysis.capture import open_capture  # noqa: PLC0415 - pyarrow takes 0.1 s
    from latrace.analysis.diff import compare  # noqa: PLC0415
    from latrace.tracer.symbols.later import with_names  # noqa: PLC0415

    a, b = with_names(open_capture(before)), with_names(open_capture(after))
    comparison = compare(a, b)
    if out is None:
        _print(comparison, as_json=as_json)
        return
    seconds = [float(comparison[side]["duration_s"]) for side in ("a", "b")]
    for path, taken in zip((before, after), seconds, strict=True):
        if taken <= 0:
            raise LatraceError(
                f"the capture {path} does not tell how long it is",
                hint="it ended before anything was recorded; record again",
            )
    from latrace.flamegraphs import build_profile, to_diff_svg  # noqa: PLC0415

    profiles = [build_profile(one, kind=kind.value, pids=False) for one in (a, b)]
    picture = to_diff_svg(*profiles, a_s=seconds[0], b_s=seconds[1]).encode()
    if out == "-":
        write_out(picture)
        return
    with open_output_file(Path(out), force=force) as stream:
        stream.write(picture)
    status = Status(quiet=quiet)
    status.say(f"Wrote {out} ({size(len(picture))})")
    status.say("Next: open it in a browser; click zooms, Ctrl-F searches")


def _print(comparison: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        text = json.dumps(comparison, indent=2, ensure_ascii=True) + "\n"
    else:
        from latrace.analysis.diff_text import render_diff  # noqa: PLC0415

        text = render_diff(comparison, width=width_of(sys.stdout), colour=wants_colour(sys.stdout))
    write_out(text)


def _check_picture(out: str, *, as_json: bool) -> None:
    if as_json:
        raise UsageError("--json and --output exclude each other", hint="run it twice")
    if out != "-" and not out.lower().endswith(".svg"):
        raise UsageError(
            f"the comparison is drawn as SVG, and the name {out} says otherwise",
            hint="end it in .svg; the words and the JSON go to stdout: > FILE",
        )
