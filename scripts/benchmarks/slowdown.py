"""How much a tracer slows its target, and those that it does not trace."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import loads
from .children import BYSTANDER, Cost, Load, held, tool
from .context import Context
from .errors import BenchError
from .estimate import estimate, ratios
from .goals import Goal
from .tables import interval_heading, paragraph, percent, percents, table
from .tools import (
    ALL_ROWS,
    CAPTURE,
    DEFAULT,
    FOR_TCP,
    NEIGHBOUR,
    OURS,
    Tool,
    peers,
)

BASELINE, AGAIN = "no tracer", "no tracer, again"


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the load under one tracer."""

    cost: Cost
    quality: dict[str, Any]
    """Of latrace's capture: rows and losses. Empty for others."""


def run(
    context: Context,
    make_load: Callable[[int], Load],
    loops: int,
    tools: Sequence[Tool] | None = None,
) -> dict[str, Any]:
    """Measure the load without a tracer, twice, and with each of them, in turn.

    `tools`: the tracers; None: all that we have, and their peers.
    """
    load = make_load(loops)
    contenders: dict[str, Callable[[], Run]] = {
        BASELINE: partial(_run, context, load, None),
        AGAIN: partial(_run, context, load, None),
    }
    for contender in _chosen(context) if tools is None else tools:
        if contender.missing:
            context.skip(contender.name, contender.missing)
        else:
            contenders[contender.name] = partial(_run, context, load, contender)
    results = context.interleave(contenders)
    if BASELINE not in results:
        raise BenchError("the load itself failed")
    base = results[BASELINE]
    return {
        "load": " ".join(load.argv),
        "contenders": {
            name: {
                "wall_ns": estimate([r.cost.wall_ns for r in runs]).as_dict(),
                "cpu_ns": estimate([r.cost.cpu_ns for r in runs]).as_dict(),
                "wall_ratio": _ratio(runs, base, lambda r: r.cost.wall_ns),
                "cpu_ratio": _ratio(runs, base, lambda r: r.cost.cpu_ns),
                "quality": [r.quality for r in runs if r.quality],
                "values": [[r.cost.wall_ns, r.cost.cpu_ns] for r in runs],
            }
            for name, runs in results.items()
        },
    }


def _ratio(runs: list[Run], base: list[Run], of: Callable[[Run], float]) -> dict[str, Any]:
    return ratios([of(run) for run in runs], [of(run) for run in base]).as_dict()


def _chosen(context: Context) -> list[Tool]:
    if not context.quick:
        return [*OURS, *peers()]
    return [DEFAULT, ALL_ROWS, NEIGHBOUR, *(peer for peer in peers() if peer.name == "runqlat -p")]


def _run(context: Context, load: Load, contender: Tool | None) -> Run:
    with (
        tempfile.TemporaryDirectory(dir=context.folder) as name,
        held(load) as process,
        contextlib.ExitStack() as tracing,
    ):
        folder = Path(name)
        if contender is not None:
            other = tracing.enter_context(held(BYSTANDER)) if contender.elsewhere else process
            argv = contender.argv(other.pid, load.comm, folder)
            tracing.enter_context(tool(argv, ready_text=contender.ready_text, folder=folder))
        process.begin()
        cost = process.finish()
        tracing.close()
        return Run(cost, dict(_quality(folder / CAPTURE)))


def _quality(capture: Path) -> Iterator[tuple[str, Any]]:
    if not capture.exists():
        return
    manifest = json.loads((capture / "manifest.json").read_text())
    for name in ("waits", "rows", "lost_events", "lost_stacks"):
        yield name, manifest["quality"][name]
    yield "self_cpu_s", manifest["overhead"]["self_cpu_s"]
    yield "seconds", (manifest["end_ns"] - manifest["start_ns"]) / 1e9


def taken_by_others(result: dict[str, Any]) -> float:
    """The share of a pinned load's CPU that others had while it ran alone, 0 to 1.

    It never sleeps, so what its threads did not use of the time was somebody else's.
    """
    runs: list[tuple[float, float]] = result["contenders"][BASELINE]["values"]
    wall_ns, cpu_ns = sum(wall for wall, _ in runs), sum(cpu for _, cpu in runs)
    return max(0.0, 1.0 - cpu_ns / wall_ns)


def render(result: dict[str, Any]) -> list[str]:
    """The slowdown by tracer."""
    rows = [
        (
            name,
            f"{found['wall_ns']['median']:,.0f}",
            percent(found["wall_ratio"]["median"]),
            percents(found["wall_ratio"]["low"], found["wall_ratio"]["high"]),
            percent(found["cpu_ratio"]["median"]),
        )
        for name, found in result["contenders"].items()
    ]
    interval = interval_heading(result["contenders"][BASELINE]["wall_ns"])
    rows[0] = (*rows[0][:2], "", "", "")
    return [
        *paragraph(result["load"]),
        "",
        *table(("tracer", "ns/op", "slower by", interval, "CPU time"), rows),
    ]


def goals(result: dict[str, Any], *, name: str, limit: float | None) -> list[Goal]:
    """The promise for a target in the default mode, and for everybody else."""
    found = result["contenders"]
    made = []
    if limit is not None and DEFAULT.name in found:
        slower = (found[DEFAULT.name]["wall_ratio"]["median"] - 1) * 100
        beside = (
            percent(found[ALL_ROWS.name]["wall_ratio"]["median"]) if ALL_ROWS.name in found else "?"
        )
        made.append(
            Goal(
                f"{name}: default (--min 0: {beside})",
                f"<= {limit:g} %",
                f"{slower:.1f} %",
                slower <= limit,
            )
        )
    if NEIGHBOUR.name in found and AGAIN in found:
        ratio, noise = found[NEIGHBOUR.name]["wall_ratio"], found[AGAIN]["wall_ratio"]
        width = max(noise["high"] - 1, 1 - noise["low"])
        made.append(
            Goal(
                f"{name}: untraced neighbour, interval from",
                f"noise: {width * 100:.1f} %",
                percent(ratio["low"]),
                ratio["low"] - 1 <= width,
            )
        )
    return made


PIPE_LOOPS, QUICK_PIPE_LOOPS = 300_000, 30_000
MESSAGING_LOOPS, QUICK_MESSAGING_LOOPS = 400, 40


def run_pipe(context: Context) -> dict[str, Any]:
    """The pinned pipe."""
    return run(context, loads.pipe, QUICK_PIPE_LOOPS if context.quick else PIPE_LOOPS)


def run_messaging(context: Context) -> dict[str, Any]:
    """Many threads on all CPUs."""
    return run(
        context, loads.messaging, QUICK_MESSAGING_LOOPS if context.quick else MESSAGING_LOOPS
    )


STREAM_LOOPS, QUICK_STREAM_LOOPS = 100_000, 10_000
REQUESTS_LOOPS, QUICK_REQUESTS_LOOPS = 60_000, 6_000


def run_stream(context: Context) -> dict[str, Any]:
    """TCP at full speed, nothing lost."""
    loops = QUICK_STREAM_LOOPS if context.quick else STREAM_LOOPS
    return run(context, loads.stream, loops, FOR_TCP)


def run_requests(context: Context) -> dict[str, Any]:
    """TCP with a byte at a time, nothing lost."""
    loops = QUICK_REQUESTS_LOOPS if context.quick else REQUESTS_LOOPS
    return run(context, loads.requests, loops, FOR_TCP)


def pipe_goals(result: dict[str, Any]) -> list[Goal]:
    """Promises for the pinned pipe."""
    return goals(result, name="pipe", limit=12)


def messaging_goals(result: dict[str, Any]) -> list[Goal]:
    """Promises for messaging: only that nobody else is slowed."""
    return goals(result, name="messaging", limit=None)


def stream_goals(result: dict[str, Any]) -> list[Goal]:
    """Promises for a TCP stream: only that nobody else is slowed."""
    return goals(result, name="TCP stream", limit=None)
