"""`latrace demo`: a real victim and a real culprit, captured and explained."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from latrace.tracer.caller import calling_account
from latrace.tracer.commands import params
from latrace.tracer.commands.console import Status
from latrace.tracer.commands.quantities import parse_run_time, show_seconds
from latrace.tracer.commands.signals import StopOnSignals
from latrace.tracer.commands.tracing import (
    Plan,
    print_summary,
    read_summary,
    say_written,
    shown_path,
    trace,
)
from latrace.tracer.demo import HOG, REQUESTS_PER_S, SERVICE, WORK_MS, Answers, Cast
from latrace.tracer.errors import UsageError
from latrace.tracer.live import show_ns
from latrace.tracer.options import Options
from latrace.tracer.outputs import open_output_file
from latrace.tracer.targets import Request, resolve

_QUIET_SHARE = 0.4
"""How much of the time the service is alone."""
_MIN_S = 1.0


def demo(
    *,
    duration: Annotated[
        str, typer.Option("-d", "--duration", metavar="TIME", help="How long to trace: 5s.")
    ] = "5s",
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="The capture; the flame graph goes beside it, as .svg. Those of an earlier demo"
            " are replaced.",
        ),
    ] = Path("latrace-demo.data"),
    verbose: params.Verbose = False,
    quiet: params.Quiet = False,
) -> None:
    """Trace a real victim and a real culprit, and explain what is seen.

    Starts a small TCP service and its client, traces the service, and after a
    while lets a program compute on the service's CPU. Needs root; the programs
    run as the user who typed sudo and are gone afterwards.

    \b
    sudo latrace demo
    """
    from latrace.tracer.doctor import require_tracing  # noqa: PLC0415

    require_tracing()
    status = Status(quiet=quiet, verbose=verbose)
    duration_s = parse_run_time(duration)
    if duration_s < _MIN_S:
        raise UsageError(f"--duration {duration} is too short to show anything", hint="5s is usual")
    alone_s = duration_s * _QUIET_SHARE
    # Started before the signals are ours and before the tracer has threads: the players are forks.
    with Cast(calling_account()) as cast, StopOnSignals() as signals:
        status.say(_introduction(cast, alone_s))
        cue = threading.Timer(alone_s, cast.provoke)
        cue.daemon = True

        def begin() -> None:
            cast.begin()
            cue.start()

        targets = resolve(Request(pids=(cast.service.pid,)))
        plan = Plan(
            options=Options(pids=targets.pids, duration_s=duration_s),
            output=output,
            force=True,
            description=targets.description,
        )
        try:
            path = trace(plan, status=status, signals=signals, on_attached=begin)
        finally:
            cue.cancel()
        alone, beside = cast.finish()
    summary = read_summary(path)
    print_summary(summary, as_json=False)
    sys.stdout.write(_explanation(alone, beside, summary))
    sys.stdout.flush()
    picture = _draw(path)
    say_written(path, status=status)
    status.say(f"Wrote {shown_path(picture)}: open it in a browser; click zooms, Ctrl-F searches.")


def _introduction(cast: Cast, alone_s: float) -> str:
    return "\n".join(
        (
            f"{SERVICE} (pid {cast.service.pid}) answers {REQUESTS_PER_S} requests/s on CPU"
            f" {cast.cpu}, each {WORK_MS} ms of work.",
            f"After {show_seconds(alone_s)} {HOG} (pid {cast.hog.pid}) computes there too,"
            " without pause.",
        )
    )


def _explanation(alone: Answers, beside: Answers, summary: dict[str, Any]) -> str:
    """What the client saw, and how the figures of the capture explain it."""
    waits = summary["waits"]
    lines = [
        "",
        f"What the clients of {SERVICE} saw:",
        f"  {'':<16}{'answers':>8}{'p50':>10}{'p99':>10}{'max':>10}",
        _row("alone", alone),
        _row(f"beside {HOG}", beside),
        "",
    ]
    if beside.count and alone.count:
        slower_ns = beside.p99_ns - alone.p99_ns
        lines += [
            f"The work for a request did not change, yet the P99 rose by {show_ns(slower_ns)}:",
            f"{SERVICE} was ready to run and did not. latrace timed each such wait in",
            f"the kernel: {waits['count']:,} of them, {show_ns(waits['total_ns'])} in all,"
            f" 1 in 100 over {show_ns(waits['p99_ns'])}.",
            f"No profile of {SERVICE} shows them: it is not running while it waits.",
            "",
        ]
    return "\n".join(lines)


def _row(name: str, answers: Answers) -> str:
    figures = (answers.p50_ns, answers.p99_ns, answers.max_ns)
    return f"  {name:<16}{answers.count:>8,}" + "".join(f"{show_ns(ns):>10}" for ns in figures)


def _draw(capture: Path) -> Path:
    """Write the flame graph of `capture` beside it; returns its path."""
    from latrace.analysis.capture import open_capture  # noqa: PLC0415
    from latrace.flamegraphs import build_profile, render  # noqa: PLC0415

    picture = capture.with_name(capture.name.removesuffix(".data") + ".svg")
    data = render(build_profile(open_capture(capture), kind="wait"), picture)
    with open_output_file(picture, force=True) as stream:
        stream.write(data)
    return picture
