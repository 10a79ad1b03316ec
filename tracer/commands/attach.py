"""`latrace attach`: trace processes that run."""

from __future__ import annotations

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
from latrace.tracer.targets import resolve


def attach(
    *,
    pid: params.Pid = None,
    tid: params.Tid = None,
    comm: params.Comm = None,
    cgroup: params.Cgroup = None,
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
    """Trace processes until Ctrl-C, a duration or their end.

    Needs root. Prints which waits the threads had, and writes a capture that
    needs no root to read and belongs to you.

    \b
    sudo latrace attach --pid 812
    sudo latrace attach --comm redis-server,node -d 30s -o spike.data
    """
    status = Status(quiet=quiet, verbose=verbose)
    request = params.make_request(pid=pid, tid=tid, comm=comm, cgroup=cgroup, children=children)
    with StopOnSignals() as signals:
        targets = resolve(request)
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
        for note in targets.notes:
            status.say(f"Note: {note}.")
        plan = Plan(options=options, output=output, force=force, description=targets.description)
        for task in targets.tasks:
            status.detail(f"  {task.tid} {visible(task.comm)}")
        path = trace(plan, status=status, signals=signals)
    give_up_root()
    print_summary(read_summary(path), as_json=as_json)
    say_written(path, status=status)
