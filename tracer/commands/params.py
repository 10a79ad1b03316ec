"""The options that mean the same in every command, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latrace.tracer.commands.quantities import parse_duration, parse_ring_size, parse_run_time
from latrace.tracer.errors import UsageError
from latrace.tracer.options import (
    ALL_ROWS_RING_BYTES,
    DEFAULT_CPU_SAMPLES_HZ,
    DEFAULT_RING_BYTES,
    DEFAULT_SLOW_NS,
    DEFAULT_STACK_BUDGET_PER_S,
    PARTS,
    Options,
)
from latrace.tracer.targets import Request, Targets, parse_ids, parse_names

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
Duration = Annotated[
    str | None,
    typer.Option(
        "-d",
        "--duration",
        metavar="TIME",
        help="Stop after this long: 30s, 5m; a bare number is seconds.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="DIR",
        help="Where the capture goes. Without it: latrace.data; an earlier one"
        " is moved to latrace.data.old.",
    ),
]
Input = Annotated[
    Path,
    typer.Option("-i", "--input", metavar="DIR", help="The capture to read."),
]
Force = Annotated[bool, typer.Option("-f", "--force", help="Replace an output that exists.")]
Minimum = Annotated[
    str | None,
    typer.Option(
        "--min",
        metavar="TIME",
        help="Record only waits of at least this in detail; 0 records all and never adapts."
        " Without it: all, until there are too many. Counts and percentiles are exact anyway.",
    ),
]
Slow = Annotated[
    str,
    typer.Option("--slow", metavar="TIME", help="A wait of at least this gets its stack."),
]
NoStacks = Annotated[
    bool, typer.Option("--no-stacks", help="Take no stacks: cheaper, no flame graph.")
]
NoUserCopy = Annotated[
    bool,
    typer.Option(
        "--no-user-stack-copy",
        help="Never read the memory of the targets' stacks: less of them is seen where code has"
        " no frame pointers.",
    ),
]
StackBudget = Annotated[
    int,
    typer.Option(
        "--stack-budget",
        metavar="N",
        min=1,
        max=1_000_000,
        help="Take at most so many stacks per second.",
    ),
]
CpuSamples = Annotated[
    int,
    typer.Option(
        "--cpu-samples",
        metavar="HZ",
        min=0,
        max=1000,
        help="See what the targets do on the CPU, so many times a second on each; 0: never.",
    ),
]
Without = Annotated[
    str | None,
    typer.Option(
        "--without",
        metavar="PART[,PART]",
        help="Leave out, to be cheaper: causes (why a wait was long), culprits (who had the CPU"
        " then), interrupts (they count as the thread's that they came in), sleeps (sleep calls).",
    ),
]
RingSize = Annotated[
    str | None,
    typer.Option(
        "--ring-size",
        metavar="SIZE",
        help="Buffer between kernel and latrace, a power of two."
        " Without it: 16M; with --min 0: 64M.",
    ),
]
Children = Annotated[
    bool,
    typer.Option("--children", help="Also all descendants alive now, and all forked later."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON, for machines.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more on the way.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing on the way but warnings.")]

DEFAULT_SLOW = f"{DEFAULT_SLOW_NS // 1000}us"
DEFAULT_BUDGET = DEFAULT_STACK_BUDGET_PER_S
DEFAULT_HZ = DEFAULT_CPU_SAMPLES_HZ


def make_request(
    *, pid: str | None, tid: str | None, comm: str | None, cgroup: list[str] | None, children: bool
) -> Request:
    """What to trace from the command line's texts. Raises `UsageError`."""
    return Request(
        pids=parse_ids(pid, option="--pid") if pid is not None else (),
        tids=parse_ids(tid, option="--tid") if tid is not None else (),
        comms=parse_names(comm, option="--comm") if comm is not None else (),
        cgroups=tuple(cgroup or ()),
        children=children,
    )


def make_options(
    targets: Targets,
    *,
    duration: str | None,
    minimum: str | None,
    slow: str,
    no_stacks: bool,
    no_user_copy: bool,
    stack_budget: int,
    cpu_samples: int,
    without: str | None,
    ring_size: str | None,
) -> Options:
    """The tracer's options from the command line's texts. Raises `UsageError`."""
    min_ns = None if minimum is None else parse_duration(minimum, option="--min")
    if ring_size is not None:
        ring_bytes = parse_ring_size(ring_size)
    else:
        ring_bytes = ALL_ROWS_RING_BYTES if min_ns == 0 else DEFAULT_RING_BYTES
    return Options(
        pids=targets.pids,
        tids=targets.tids,
        comms=targets.comms,
        cgroups=targets.cgroups,
        children=targets.children,
        min_ns=min_ns,
        slow_ns=parse_duration(slow, option="--slow"),
        stacks=not no_stacks,
        user_copies=not no_user_copy,
        stack_budget_per_s=stack_budget,
        cpu_samples_hz=cpu_samples,
        without=_parse_parts(without) if without is not None else frozenset(),
        ring_bytes=ring_bytes,
        duration_s=None if duration is None else parse_run_time(duration),
    )


def _parse_parts(text: str) -> frozenset[str]:
    parts = frozenset(part.strip() for part in text.split(","))
    if unknown := sorted(parts - frozenset(PARTS)):
        raise UsageError(
            f"--without {unknown[0]!r}: there is no such part",
            hint=f"parts are: {', '.join(PARTS)}",
        )
    return parts
