"""`latrace demo`: a real victim and a real culprit, captured and explained."""

from __future__ import annotations

import shlex
import sys
import textwrap
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latrace.analysis import words
from latrace.tracer.caller import calling_account
from latrace.tracer.commands import params
from latrace.tracer.commands.console import Status, program, width_of, write_out
from latrace.tracer.commands.quantities import parse_run_time, show_seconds
from latrace.tracer.commands.signals import StopOnSignals
from latrace.tracer.commands.tracing import (
    Plan,
    give_up_root,
    print_summary,
    read_summary,
    say_next,
    size_of,
    trace,
)
from latrace.tracer.errors import UsageError
from latrace.tracer.options import Options
from latrace.tracer.outputs import open_output_file
from latrace.tracer.targets import Request, resolve

if TYPE_CHECKING:
    from latrace.tracer.demo import Answers, Cast

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
    from latrace.tracer.demo import Cast  # noqa: PLC0415
    from latrace.tracer.doctor import require_tracing, sudo  # noqa: PLC0415

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
    import latrace.flamegraphs  # noqa: F401, PLC0415 - while it can be read for sure

    give_up_root()
    summary = read_summary(path)
    print_summary(summary, as_json=False)
    write_out(_explanation(alone, beside, summary))
    picture = _draw(path)
    status.say(f"Wrote {path} ({size_of(path)}) and {picture}")
    say_next(
        (
            (
                f"xdg-open {shlex.quote(str(picture))}",
                "zoom by click, search by Ctrl-F",
            ),
            (sudo(f"{program()} attach --pid PID"), "the same for a program of yours"),
        ),
        status=status,
    )


def _introduction(cast: Cast, alone_s: float) -> str:
    from latrace.tracer.demo import REQUESTS_PER_S, WORK_MS  # noqa: PLC0415

    service, hog = cast.service, cast.hog
    return textwrap.fill(
        f"{service.name} (pid {service.pid}) answers {REQUESTS_PER_S} requests/s on CPU {cast.cpu},"
        f" each {WORK_MS} ms of work. After {show_seconds(alone_s)} {hog.name} (pid {hog.pid})"
        " computes on the same CPU, without pause.",
        width_of(sys.stderr),
    )


def _explanation(alone: Answers, beside: Answers, summary: dict[str, Any]) -> str:
    """What the client saw, and how the figures of the capture explain it."""
    from latrace.tracer.demo import HOG, SERVICE  # noqa: PLC0415

    lines = [
        "",
        f"What the clients of {SERVICE} saw:",
        f"  {'':<18}{'answers':>8}{'p50':>10}{'p99':>10}{'max':>10}",
        _row("alone", alone),
        _row(f"beside {HOG}", beside),
        "",
    ]
    if alone.count and beside.count:
        waits = summary["waits"]
        told = (
            f"latrace timed each of the {waits['count']:,} waits of {SERVICE} in the kernel:"
            f" {words.duration(waits['total_ns'])} in which it was ready to run and did not, one in"
            f" a hundred longer than {words.duration(waits['p99_ns'])}. No CPU profile shows them,"
            " as nothing of the service runs meanwhile."
        )
        # On a busy machine one stray answer makes the P99 of so few: the median shows it still.
        name, before_ns, after_ns = max(
            ("P99", alone.p99_ns, beside.p99_ns),
            ("median", alone.p50_ns, beside.p50_ns),
            key=lambda figures: figures[2] / max(1, figures[1]),
        )
        if after_ns > before_ns:
            told = (
                f"The work for a request stayed the same, yet their {name} went from"
                f" {words.duration(before_ns)} to {words.duration(after_ns)}. {told}"
            )
        else:
            told = f"This machine was so busy before that {HOG} made no difference. {told}"
        lines += [*textwrap.wrap(told, width_of(sys.stdout)), ""]
    return "\n".join(lines) + "\n"


def _row(name: str, answers: Answers) -> str:
    figures = (answers.p50_ns, answers.p99_ns, answers.max_ns)
    cells = "".join(f"{words.duration(figure):>10}" for figure in figures)
    return f"  {name:<18}{answers.count:>8,}{cells}"


def _draw(capture: Path) -> Path:
    """Write the flame graph of `capture` beside it; returns its path."""
    from latrace.analysis.capture import open_capture  # noqa: PLC0415
    from latrace.flamegraphs import Shape, build_profile, render  # noqa: PLC0415

    picture = capture.with_name(capture.name.removesuffix(".data") + ".svg")
    # Without what every Python program has, the service fits on a screen.
    shape = Shape(collapse=True)
    data = render(build_profile(open_capture(capture), kind="wait", shape=shape), picture)
    with open_output_file(picture, force=True) as stream:
        stream.write(data)
    return picture
