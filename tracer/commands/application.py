"""The typer application: the top-level options and the list of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from latrace import __version__
from latrace.tracer.commands.attach import attach
from latrace.tracer.commands.demo import demo
from latrace.tracer.commands.diff import diff
from latrace.tracer.commands.doctor import doctor
from latrace.tracer.commands.flame import flame
from latrace.tracer.commands.report import report
from latrace.tracer.commands.run import run
from latrace.tracer.commands.spikes import spikes
from latrace.tracer.commands.tcp import tcp
from latrace.tracer.commands.trigger import trigger
from latrace.tracer.commands.watch import watch

_EXIT_USAGE = 2

app = typer.Typer(
    name="latrace",
    # Plain help, without rich: it would double the start-up time of every command.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    # Completion comes as files (docs/completions); an option that edits ~/.bashrc is no good here.
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"latrace {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def latrace(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 - its callback does all
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Which waits made the P99 spike, and where in the code?

    latrace times every wait of a program's threads for a CPU, in the kernel,
    exactly, and says where they waited and who woke them.

    \b
      sudo latrace demo               a real example, in a few seconds
      sudo latrace attach --pid PID   trace a process until Ctrl-C
      sudo latrace watch --pid PID    capture a spike by itself, when it happens
      sudo latrace tcp                what TCP sends again, and whose it is
      latrace flame wait.svg          the last capture as a flame graph
      sudo latrace doctor             can this host do it?

    \b
    Exit codes: 0 ok, 1 failed while running, 2 usage, 3 a privilege or kernel
    feature is missing, 4 no such target, 5 a budget was exceeded.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(_EXIT_USAGE)


for _command in (attach, run, watch, trigger, spikes, tcp, flame, report, diff, doctor, demo):
    app.command(
        # The traced program's own options are its own, with or without a -- before it.
        context_settings={"allow_interspersed_args": False} if _command is run else None
    )(_command)
