"""`latrace attach`: trace processes that run."""

from __future__ import annotations

from typing import Annotated

import typer

from latrace.analysis.words import visible
from latrace.tracer.commands import params
from latrace.tracer.commands.console import Status
from latrace.tracer.commands.signals import StopOnSignals
from latrace.tracer.commands.tracing import (
    Plan,
    give_up_root,
    print_summary,
    read_summary,
    say_written,
    trace,
)
from latrace.tracer.targets import Request, parse_ids, parse_names, resolve

Pid = Annotated[
    str | None,
    typer.Option(
        "-p", "--pid", metavar="PID[,PID]", help="Processes: all their threads, present and future."
    ),
]
Tid = Annotated[
    str | None, typer.Option("-t", "--tid", metavar="TID[,TID]", help="Single threads.")
]
Comm = Annotated[
    str | None,
    typer.Option(
        "--comm", metavar="NAME[,NAME]", help="Processes by name; a trailing * is a prefix."
    ),
]
Cgroup = Annotated[
    list[str] | None,
    typer.Option(
        "--cgroup",
        metavar="PATH",
        help="All processes of a cgroup, present and future: its directory, or its path in the"
        " cpu (v1) or unified (v2) hierarchy. May be repeated.",
    ),
]


def attach(
    *,
    pid: Pid = None,
    tid: Tid = None,
    comm: Comm = None,
    cgroup: Cgroup = None,
    children: params.Children = False,
    duration: params.Duration = None,
    output: params.Output = None,
    force: params.Force = False,
    minimum: params.Minimum = None,
    slow: params.Slow = params.DEFAULT_SLOW,
    no_stacks: params.NoStacks = False,
    stack_budget: params.StackBudget = params.DEFAULT_BUDGET,
    cpu_samples: params.CpuSamples = params.DEFAULT_HZ,
    without: params.Without = None,
    ring_size: params.RingSize = None,
    as_json: params.Json = False,
    verbose: params.Verbose = False,
    quiet: params.Quiet = False,
) -> None:
    """Trace processes until Ctrl-C, a duration or their end.

    Needs root. Prints which waits the threads had, and writes a capture that
    needs no root to read and belongs to you.

    \b
    sudo latrace attach --pid 812
    sudo latrace attach --comm redis-server,node -d 30s -o spike.data
    """
    status = Status(quiet=quiet, verbose=verbose)
    request = Request(
        pids=parse_ids(pid, option="--pid") if pid is not None else (),
        tids=parse_ids(tid, option="--tid") if tid is not None else (),
        comms=parse_names(comm, option="--comm") if comm is not None else (),
        cgroups=tuple(cgroup or ()),
        children=children,
    )
    with StopOnSignals() as signals:
        targets = resolve(request)
        options = params.make_options(
            targets,
            duration=duration,
            minimum=minimum,
            slow=slow,
            no_stacks=no_stacks,
            stack_budget=stack_budget,
            cpu_samples=cpu_samples,
            without=without,
            ring_size=ring_size,
        )
        for note in targets.notes:
            status.say(f"Note: {note}.")
        plan = Plan(options=options, output=output, force=force, description=targets.description)
        for task in targets.tasks:
            status.detail(f"  {task.tid} {visible(task.comm)}")
        path = trace(plan, status=status, signals=signals)
    give_up_root()
    print_summary(read_summary(path), as_json=as_json)
    say_written(path, status=status)
