"""`latrace trigger`: ask a running watch for a bundle now."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from latrace.analysis.words import visible
from latrace.tracer.commands.console import command_line, write_out
from latrace.tracer.doctor import sudo
from latrace.tracer.errors import HostError, LatraceError
from latrace.tracer.watch.control import send


def trigger(
    *,
    reason: Annotated[
        str,
        typer.Argument(metavar="REASON", help="Why; it is kept in the bundle.", show_default=False),
    ] = "",
    watch: Annotated[
        int | None,
        typer.Option(
            "--watch", metavar="PID", min=1, help="Which watch is meant, where several run."
        ),
    ] = None,
) -> None:
    """Make a running watch keep these seconds, with a reason.

    Needs root. What `latrace watch` has of the last seconds becomes a bundle
    as if a rule had fired. kill -USR2 PID does the same without a reason.

    \b
    sudo latrace trigger "checkout was slow just now"
    """
    if os.geteuid() != 0:
        raise HostError(
            "asking a watch for a bundle needs root: it would tell of others' programs",
            hint=sudo(command_line()),
        )
    user = os.environ.get("SUDO_USER") or os.environ.get("LOGNAME") or "root"
    answer = send(reason, pid=watch, asked_by=user)
    if not answer["ok"]:
        raise LatraceError(
            visible(answer["message"]), hint="the watch runs on; what it prints says more"
        )
    write_out(visible(answer["message"]) + "\n")
