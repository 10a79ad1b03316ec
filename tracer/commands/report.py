"""`latrace report`: a capture in words or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latrace.tracer.commands import params
from latrace.tracer.commands.quantities import parse_duration, parse_moment
from latrace.tracer.commands.tracing import print_summary
from latrace.tracer.errors import UsageError
from latrace.tracer.outputs import DEFAULT_NAME
from latrace.tracer.targets import parse_ids

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


def report(
    *,
    source: params.Input = Path(DEFAULT_NAME),
    since: Since = None,
    until: Until = None,
    tid: Tid = None,
    over: Over = None,
    as_json: params.Json = False,
) -> None:
    """Tell in words, or as JSON, why the threads of a capture waited.

    What the slow waits were spent on and who had the CPU meanwhile, how exact
    the figures are, and what tracing cost. Needs no root.

    \b
    latrace report
    latrace report --since 1m30s --until 1m35s --over 5ms
    latrace report --json -i spike.data | jq .waits.tail.by_cause_ns
    """
    from latrace.analysis.capture import open_capture  # noqa: PLC0415 - pyarrow takes 0.1 s
    from latrace.analysis.selection import Selection  # noqa: PLC0415
    from latrace.analysis.summary import summarise  # noqa: PLC0415

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
    print_summary(summarise(open_capture(source), selection=selection), as_json=as_json)
