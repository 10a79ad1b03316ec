"""`latrace watch`: keep the last seconds, and write them down when P99 spikes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from latrace.tracer.commands import params
from latrace.tracer.commands.console import Status, program
from latrace.tracer.commands.quantities import (
    parse_duration,
    parse_percent,
    parse_size,
    parse_span,
)
from latrace.tracer.commands.signals import StopOnSignals
from latrace.tracer.commands.tracing import say_next
from latrace.tracer.errors import UsageError
from latrace.tracer.targets import resolve
from latrace.tracer.watch.bundles import DEFAULT_NAME
from latrace.tracer.watch.plan import ApplicationRule, Plan

Output = Annotated[
    Path,
    typer.Option("-o", "--output", metavar="DIR", help="Where the bundles go."),
]
Limit = "[sleep=]TIME"


def _limit(name: str, about: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(name, metavar=Limit, help=about)
    return option


P50 = Annotated[list[str] | None, _limit("--p50", "Fire when the median is above this.")]
P90 = Annotated[list[str] | None, _limit("--p90", "The same of the 90th percentile.")]
P95 = Annotated[list[str] | None, _limit("--p95", "The same of the 95th.")]
P99 = Annotated[
    list[str] | None,
    _limit(
        "--p99",
        "The same of the 99th: 10ms is of waits for a CPU, sleep=10ms of how late sleep calls"
        " came back. Every rule may be given more than once.",
    ),
]
P999 = Annotated[list[str] | None, _limit("--p999", "The same of the 99.9th.")]
Ratio = Annotated[
    list[str] | None,
    typer.Option(
        "--p99-ratio",
        metavar="[sleep=]N",
        help="Fire when the P99 is N times what is usual here. Without any rule: 3.",
    ),
]
Floor = Annotated[
    str, typer.Option("--floor", metavar="TIME", help="With --p99-ratio: below this is no spike.")
]
Longest = Annotated[
    list[str] | None, _limit("--max", "Fire when a single wait is longer than this.")
]
RetransmitCount = Annotated[
    int | None,
    typer.Option(
        "--retransmits",
        metavar="N",
        min=1,
        help="Fire when so many TCP segments are sent again within the window.",
    ),
]
MetricsUrl = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="URL",
        help="Ask the application itself, for its Prometheus metrics, once a second.",
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help='The histogram or summary of its latency; NAME{label="value"} takes some series.',
    ),
]
Quantile = Annotated[
    float,
    typer.Option("--quantile", metavar="Q", min=0, max=1, help="Which quantile of it."),
]
Above = Annotated[
    str | None, typer.Option("--above", metavar="TIME", help="Fire when that is above this.")
]
Pprof = Annotated[
    str | None,
    typer.Option(
        "--pprof",
        metavar="URL",
        help="Lay the profiles of a Go service into the bundle: http://127.0.0.1:6060.",
    ),
]
Span = Annotated[
    str, typer.Option("--window", metavar="TIME", help="Over how long percentiles are taken.")
]
MinCount = Annotated[
    int,
    typer.Option(
        "--min-count", metavar="N", min=1, help="Fewer values in the window are no percentile."
    ),
]
Before = Annotated[
    str, typer.Option("--before", metavar="TIME", help="What a bundle has from before the moment.")
]
After = Annotated[
    str, typer.Option("--after", metavar="TIME", help="What it has from after the moment.")
]
Cooldown = Annotated[
    str,
    typer.Option(
        "--cooldown", metavar="TIME", help="At least so long from one bundle to the next."
    ),
]
Memory = Annotated[
    str,
    typer.Option("--memory", metavar="SIZE", help="For what is kept; the oldest goes first."),
]
Keep = Annotated[
    int, typer.Option("--keep", metavar="N", min=1, help="Bundles to keep; the oldest goes first.")
]
Disk = Annotated[
    str, typer.Option("--disk", metavar="SIZE", help="The same, by what they take together.")
]
OnSpike = Annotated[
    str | None,
    typer.Option(
        "--on-spike",
        metavar="CMD",
        help="Run this as you, with the bundle's path behind it; not by a shell.",
    ),
]
BudgetShare = Annotated[
    str,
    typer.Option(
        "--budget",
        metavar="PERCENT",
        help="Of one CPU, for our own work; above it there are fewer details.",
    ),
]
Once = Annotated[bool, typer.Option("--once", help="End after the first bundle.")]


def watch(
    *,
    pid: params.Pid = None,
    tid: params.Tid = None,
    comm: params.Comm = None,
    cgroup: params.Cgroup = None,
    children: params.Children = False,
    p50: P50 = None,
    p90: P90 = None,
    p95: P95 = None,
    p99: P99 = None,
    p999: P999 = None,
    p99_ratio: Ratio = None,
    floor: Floor = "1ms",
    longest: Longest = None,
    retransmits: RetransmitCount = None,
    metrics: MetricsUrl = None,
    metric: Metric = None,
    quantile: Quantile = 0.99,
    above: Above = None,
    pprof: Pprof = None,
    window: Span = "5s",
    min_count: MinCount = 100,
    before: Before = "10s",
    after: After = "5s",
    cooldown: Cooldown = "60s",
    memory: Memory = "256M",
    output: Output = Path(DEFAULT_NAME),
    keep: Keep = 20,
    disk: Disk = "2G",
    on_spike: OnSpike = None,
    once: Once = False,
    budget: BudgetShare = "2%",
    duration: params.Duration = None,
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
    """Capture a spike of P99 by itself, with the seconds before it.

    Needs root. Keeps the last seconds of everything that attach records in
    memory. When a rule fires, they and some more are written as a bundle: a
    capture with a report that says what the spike was made of. Then it goes on.
    SIGUSR2 and `latrace trigger` fire by hand.

    \b
    sudo latrace watch --pid 812 --p99 10ms
    sudo latrace watch --comm redis-server --p99-ratio 3 --max 50ms
    """
    status = Status(quiet=quiet, verbose=verbose)
    # Late: the rules need numpy, and --help does not.
    from latrace.tracer.watch.pprof import parse_pprof_url  # noqa: PLC0415
    from latrace.tracer.watch.rules import DEFAULT_RATIO, make_rules  # noqa: PLC0415
    from latrace.tracer.watch.settings import Settings  # noqa: PLC0415

    percentiles = {"p50": p50, "p90": p90, "p95": p95, "p99": p99, "p999": p999}
    asked = (p50, p90, p95, p99, p999, p99_ratio, longest, retransmits, metrics)
    settings = Settings(
        before_s=parse_span(before, option="--before"),
        after_s=parse_span(after, option="--after"),
        cooldown_s=parse_span(cooldown, option="--cooldown", least_s=0),
        window_s=parse_span(window, option="--window"),
        memory_bytes=parse_size(memory, option="--memory"),
        budget_percent=parse_percent(budget, option="--budget"),
        once=once,
    )
    rules = make_rules(
        percentiles={name: values or () for name, values in percentiles.items()},
        ratios=p99_ratio or (() if any(asked) else (DEFAULT_RATIO,)),
        longest=longest or (),
        retransmits=retransmits,
        window_s=settings.window_s,
        least=min_count,
        floor_ns=parse_duration(floor, option="--floor"),
    )
    application = _parse_application(metrics, metric, quantile, above, least=min_count)
    request = params.make_request(pid=pid, tid=tid, comm=comm, cgroup=cgroup, children=children)
    plan = Plan(
        settings=settings,
        rules=rules,
        application=application,
        pprof=None if pprof is None else parse_pprof_url(pprof),
        output=output,
        keep=keep,
        disk_bytes=parse_size(disk, option="--disk"),
        on_spike=_words(on_spike),
        once=once,
        as_json=as_json,
    )
    for option, url in (("--metrics", metrics), ("--pprof", pprof)):
        if url is not None and pid is None:
            raise UsageError(
                f"{option} is asked in the network of a process, and none is named",
                hint="name the process with --pid",
            )
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
        from latrace.tracer.watch.service import run  # noqa: PLC0415 - after what can be wrong

        path = run(plan, options, targets, status=status, signals=signals)
    say_next(
        [(f"{program()} spikes {shlex.quote(path)}", "the bundles, a line each")], status=status
    )


def _parse_application(
    metrics: str | None, metric: str | None, quantile: float, above: str | None, *, least: int
) -> ApplicationRule | None:
    """What is wanted of the application's own metrics. Raises UsageError."""
    if metrics is None and metric is None and above is None:
        return None
    if metrics is None or metric is None or above is None:
        raise UsageError(
            "--metrics, --metric and --above belong together",
            hint="--metrics http://127.0.0.1:8080/metrics"
            " --metric http_request_duration_seconds --above 100ms",
        )
    from latrace.tracer.watch.fetch import parse_url  # noqa: PLC0415 - as above
    from latrace.tracer.watch.metrics import parse_metric  # noqa: PLC0415

    return ApplicationRule(
        url=parse_url(metrics, option="--metrics"),
        spec=parse_metric(metric, quantile),
        above_ns=parse_duration(above, option="--above"),
        least=least,
    )


def _words(command: str | None) -> list[str]:
    """A command line as words. Raises UsageError."""
    if command is None:
        return []
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--on-spike {command!r}: {error}", hint="quote it twice") from None
    if not words:
        raise UsageError("--on-spike is empty", hint="name a program, such as ./tell-me")
    return words
