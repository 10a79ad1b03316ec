"""`latrace run`: start a program and trace it from its first instruction."""

from __future__ import annotations

import os
import signal
from typing import Annotated

import typer

from latrace.analysis.words import visible
from latrace.tracer.caller import calling_account
from latrace.tracer.commands import params
from latrace.tracer.commands.console import Status
from latrace.tracer.commands.held import HeldProgram
from latrace.tracer.commands.signals import StopOnSignals
from latrace.tracer.commands.tracing import (
    Plan,
    give_up_root,
    print_summary,
    read_summary,
    say_written,
    trace,
)
from latrace.tracer.targets import Request, resolve

_GRACE_S = 5.0
"""How long the program may take to end after Ctrl-C or SIGTERM before we go on without it."""

Command = Annotated[
    list[str],
    typer.Argument(
        metavar="CMD...", help="The program and its arguments, after --.", show_default=False
    ),
]


def run(
    *,
    command: Command,
    children: params.Children = False,
    duration: params.Duration = None,
    output: params.Output = None,
    force: params.Force = False,
    minimum: params.Minimum = None,
    slow: params.Slow = params.DEFAULT_SLOW,
    no_stacks: params.NoStacks = False,
    no_user_copy: params.NoUserCopy = False,
    stack_budget: params.StackBudget = params.DEFAULT_BUDGET,
    cpu_samples: params.CpuSamples = params.DEFAULT_HZ,
    without: params.Without = None,
    ring_size: params.RingSize = None,
    as_json: params.Json = False,
    verbose: params.Verbose = False,
    quiet: params.Quiet = False,
) -> None:
    """Start a program and trace it from its first instruction.

    Needs root; the program itself runs as the user who typed sudo. Ctrl-C
    reaches the program too. If the trace ends first (-d, SIGTERM), the
    program is asked to end (SIGTERM). How it ended is printed; latrace's own
    exit code only tells how the tracing went.

    \b
    sudo latrace run -- ./server --port 8080
    sudo latrace run --children -o build.data -- make -j4
    """
    status = Status(quiet=quiet, verbose=verbose)
    # Before the fork, so that a missing right leaves nothing behind.
    from latrace.tracer.doctor import require_tracing  # noqa: PLC0415

    require_tracing()
    name = visible(command[0])
    with StopOnSignals(interrupt_grace_s=_GRACE_S) as signals:
        program = HeldProgram(command, account=calling_account())
        try:
            targets = resolve(Request(pids=(program.pid,), children=children))
            options = params.make_options(
                targets,
                duration=duration,
                minimum=minimum,
                slow=slow,
                no_stacks=no_stacks,
                no_user_copy=no_user_copy,
                stack_budget=stack_budget,
                cpu_samples=cpu_samples,
                without=without,
                ring_size=ring_size,
            )
            plan = Plan(
                options=options,
                output=output,
                force=force,
                description=f"{name} (pid {program.pid}) from its start",
                redraw=False,
            )
            path = trace(plan, status=status, signals=signals, on_attached=program.release)
            program.terminate()
            ended = program.wait(timeout_s=_GRACE_S)
        finally:
            program.terminate()
            program.close()
    status.say(describe_end(name, ended, pid=program.pid))
    give_up_root()
    print_summary(read_summary(path), as_json=as_json)
    say_written(path, status=status)


def describe_end(name: str, status: int | None, *, pid: int) -> str:
    """How the program `name` ended, from its wait status; None: it has not."""
    if status is None:
        return f"{name} (pid {pid}) still runs, no longer traced."
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            return f"{name} was ended by {signal.Signals(number).name}."
        except ValueError:  # a real-time signal has no name
            return f"{name} was ended by signal {number}."
    return f"{name} ended with exit status {os.WEXITSTATUS(status)}."
