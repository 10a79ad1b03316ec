"""`latrace report`: a capture in words or as JSON."""

from __future__ import annotations

from pathlib import Path

from latrace.tracer.commands import params
from latrace.tracer.commands.tracing import print_summary, read_summary
from latrace.tracer.outputs import DEFAULT_NAME


def report(
    *,
    source: params.Input = Path(DEFAULT_NAME),
    as_json: params.Json = False,
) -> None:
    """Tell in words, or as JSON, what a capture holds.

    The waits, how exact the figures are, and what tracing cost. Needs no root.

    \b
    latrace report
    latrace report --json -i spike.data | jq .waits.p99_ns
    """
    print_summary(read_summary(source), as_json=as_json)
