"""`latrace report`: a capture in words or as JSON."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latrace.analysis.words import size
from latrace.tracer.commands import params
from latrace.tracer.commands.console import Status, wants_colour, width_of, write_out
from latrace.tracer.commands.quantities import parse_duration, parse_moment
from latrace.tracer.commands.tracing import print_summary
from latrace.tracer.errors import UsageError
from latrace.tracer.outputs import DEFAULT_NAME, open_output_file
from latrace.tracer.targets import parse_ids

if TYPE_CHECKING:
    from latrace.analysis.capture import Capture
    from latrace.analysis.spike_file import Told

Since = Annotated[
    str | None,
    typer.Option(
        "--since", metavar="TIME", help="Only what ended from so long after the start on: 1m30s."
    ),
]
Until = Annotated[
    str | None,
    typer.Option("--until", metavar="TIME", help="Only what ended before that time."),
]
Tid = Annotated[
    str | None, typer.Option("-t", "--tid", metavar="TID[,TID]", help="Only these threads.")
]
Over = Annotated[
    str | None,
    typer.Option(
        "--over",
        metavar="TIME",
        help="Only waits longer than this, and sleep calls that came back so late: 5ms.",
    ),
]

Page = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE.html",
        help="Write a page with plots and flame graphs instead: one file that needs nothing"
        " else. - is stdout.",
    ),
]


def report(
    *,
    source: params.Input = Path(DEFAULT_NAME),
    since: Since = None,
    until: Until = None,
    tid: Tid = None,
    over: Over = None,
    as_json: params.Json = False,
    out: Page = None,
    force: params.Force = False,
    quiet: params.Quiet = False,
) -> None:
    """Tell why the threads waited: in words, as JSON or as a page.

    What the slow waits were spent on and who had the CPU meanwhile, how exact
    the figures are, and what tracing cost. Of what latrace watch wrote: first
    what the spike was made of, and the time before it. Needs no root.

    \b
    latrace report
    latrace report -o report.html
    latrace report --since 1m30s --until 1m35s --over 5ms
    latrace report --json -i spike.data | jq .waits.tail.by_cause_ns
    """
    if out is not None:
        _check_page(out, as_json=as_json)
    from latrace.analysis.capture import open_capture  # noqa: PLC0415 - pyarrow takes 0.1 s
    from latrace.analysis.selection import Selection  # noqa: PLC0415
    from latrace.analysis.summary import summarise  # noqa: PLC0415
    from latrace.tracer.symbols.later import with_names  # noqa: PLC0415

    selection = Selection(
        since_ns=None if since is None else parse_moment(since, option="--since"),
        until_ns=None if until is None else parse_moment(until, option="--until"),
        tids=() if tid is None else parse_ids(tid, option="--tid"),
        over_ns=None if over is None else parse_duration(over, option="--over"),
    )
    if selection.until_ns is not None and selection.until_ns <= (selection.since_ns or 0):
        raise UsageError(
            f"nothing lies between --since {since or 0} and --until {until}",
            hint="both count from the start of the capture",
        )
    capture = with_names(open_capture(source))
    summary = summarise(capture, selection=selection)
    told = _spike_of(capture) if selection.everything else None
    if out is None:
        if told is not None and as_json:
            summary["spike"] = told.document()
        elif told is not None:
            _print_spike(told)
        print_summary(summary, as_json=as_json)
        return
    from latrace.analysis.report_html import render_html  # noqa: PLC0415 - matplotlib: 1 s

    page = render_html(capture, summary, selection=selection, spike=told)
    if out == "-":
        write_out(page)
        return
    path = Path(out)
    with open_output_file(path, force=force) as stream:
        stream.write(page)
    status = Status(quiet=quiet)
    status.say(f"Wrote {path} ({size(len(page))})")
    status.say("Next: open it in a browser; it asks nothing of the network")


def _spike_of(capture: Capture) -> Told | None:
    """What a bundle of `latrace watch` tells beside its tables; None: it is another capture."""
    from latrace.analysis.errors import CaptureError  # noqa: PLC0415
    from latrace.analysis.spikes import SPIKE_FILE, explain  # noqa: PLC0415

    if not os.path.lexists(capture.path / SPIKE_FILE):
        return None
    try:
        return explain(capture)
    except CaptureError as error:  # the capture can be read all the same
        Status().warn(f"!!! {error.cause}")
        return None


def _print_spike(told: Told) -> None:
    from latrace.analysis.spike_text import render_spike  # noqa: PLC0415

    text = render_spike(
        told.analysis, told.spike, width=width_of(sys.stdout), colour=wants_colour(sys.stdout)
    )
    write_out(text + "\n")


def _check_page(out: str, *, as_json: bool) -> None:
    if as_json:
        raise UsageError("--json and --output exclude each other", hint="run it twice")
    if out != "-" and not out.lower().endswith((".html", ".htm")):
        raise UsageError(
            f"the report is written as a page, and the name {out} says otherwise",
            hint="end it in .html; the words and the JSON go to stdout: > FILE",
        )
