"""What one run of each BPF program takes, for an event of a target and of anybody else.

The kernel's BPF statistics time each run of a program. Reading the clock twice for that adds to
every figure, and the way from the kernel's tracepoint into a program is in none of them: so both
are measured beside, with a program that does nothing.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from latrace.tracer import bpf
from latrace.tracer import compile as compiler
from latrace.tracer.btf import Btf, read_btf

from . import loads
from .children import BYSTANDER, Cost, Load, held, tool
from .context import Context
from .errors import BenchError
from .estimate import estimate
from .goals import Goal, at_most
from .kernel import attached_programs
from .tables import paragraph, table
from .tools import ALL_ROWS, DEFAULT, NEIGHBOUR, NO_STACKS, Tool, typed_peers

LOOPS, QUICK_LOOPS = 200_000, 20_000
STACKED = 8
"""Empty programs on one tracepoint, to see the cost of the call above the noise."""
_SHORT = {
    "sched_waking": "waking",
    "sched_wakeup": "wakeup",
    "sched_switch": "switch",
    "sched_exit_tp": "exit",
}
_SOURCE = "int lat_empty(void *ctx) { return 0; }\n"
_MIN_RUNS = 1000
"""A program that ran less often was not driven by the load."""


def run(context: Context) -> dict[str, Any]:
    """Measure latrace's programs in each mode, and an empty one, under the pinned pipe."""
    load = loads.pipe(QUICK_LOOPS if context.quick else LOOPS)
    empty = Empty()
    try:
        timed = {tool.name: partial(_timed, context, load, tool) for tool in _chosen(context)}
        results = context.interleave({"empty": partial(_timed_empty, load, empty)} | timed)
        costs = context.interleave(
            {
                "no program": partial(_with_empty, load, empty, 0),
                f"{STACKED} empty programs": partial(_with_empty, load, empty, STACKED),
            }
        )
    finally:
        empty.close()
    if "empty" not in results or len(costs) < 2:
        raise BenchError("the load itself failed")
    without, stacked = costs.values()
    per_call = [
        (more.cpu_ns - less.cpu_ns) / (2 * STACKED)
        for less, more in zip(without, stacked, strict=True)
    ]
    return {
        "load": " ".join(load.argv),
        "call_ns": estimate(per_call).as_dict(),
        "programs": {
            mode: {
                name: estimate([run[name] for run in runs]).as_dict()
                for name in runs[0]
                if all(name in run for run in runs)
            }
            for mode, runs in results.items()
        },
    }


class Empty:
    """A program that does nothing, for sched_switch."""

    def __init__(self) -> None:
        module = compiler.import_bcc().BPF(
            text=_SOURCE.encode(), cflags=[f"-I{compiler.PROBES}", "-Wno-unused-function"]
        )
        type_id = Btf(read_btf()).tracepoint("sched_switch")
        if type_id is None:
            raise BenchError("this kernel has no sched_switch tracepoint in its BTF")
        self.program = bpf.load_program(
            "lat_empty", module.dump_func(b"lat_empty"), attach_type_id=type_id, iterator=False
        )

    @contextlib.contextmanager
    def attached(self, times: int) -> Iterator[None]:
        """Have it called `times` times for every switch."""
        links = [bpf.attach_tracepoint(self.program) for _ in range(times)]
        try:
            yield
        finally:
            for link in links:
                os.close(link)

    def close(self) -> None:
        """Free it."""
        os.close(self.program)


@contextlib.contextmanager
def _statistics() -> Iterator[None]:
    switch = bpf.enable_statistics()
    try:
        yield
    finally:
        os.close(switch)


def _with_empty(load: Load, empty: Empty, times: int) -> Cost:
    with held(load) as process, empty.attached(times):
        process.begin()
        return process.finish()


def _timed_empty(load: Load, empty: Empty) -> dict[str, float]:
    before = bpf.program_statistics(empty.program)
    with _statistics():
        _with_empty(load, empty, 1)
    after = bpf.program_statistics(empty.program)
    return {"switch": (after.run_ns - before.run_ns) / (after.runs - before.runs)}


def _chosen(context: Context) -> Iterator[Tool]:
    yield from (DEFAULT, ALL_ROWS, NO_STACKS, NEIGHBOUR)
    for peer in () if context.quick else typed_peers():
        if peer.missing:
            context.skip(peer.name, peer.missing)
        else:
            yield peer


def _timed(context: Context, load: Load, contender: Tool) -> dict[str, float]:
    """The ns per run of each program of one run of a tracer, by tracepoint."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=context.folder)))
        stack.enter_context(_statistics())
        target = process = stack.enter_context(held(load))
        if contender.elsewhere:
            target = stack.enter_context(held(BYSTANDER))
        argv = contender.argv(target.pid, load.comm, folder)
        running = stack.enter_context(tool(argv, ready_text=contender.ready_text, folder=folder))
        programs = attached_programs(running.process.pid)
        for program in programs.values():
            stack.callback(os.close, program)
        before = {where: bpf.program_statistics(fd) for where, fd in programs.items()}
        process.begin()
        process.finish()
        found = {}
        for where, program in programs.items():
            now = bpf.program_statistics(program)
            runs = now.runs - before[where].runs
            if where in _SHORT and runs > _MIN_RUNS:
                found[_SHORT[where]] = (now.run_ns - before[where].run_ns) / runs
        if not found:
            raise BenchError("none of its programs ran for the load")
        return found


def render(result: dict[str, Any]) -> list[str]:
    """Nanoseconds per run, as the kernel's statistics have them."""
    columns = list(_SHORT.values())
    rows = []
    for mode, found in result["programs"].items():
        cells = [_show(found[name]) if name in found else "" for name in columns]
        rows.append((mode, *cells))
    empty = result["programs"]["empty"]["switch"]["median"]
    call = result["call_ns"]
    return [
        *paragraph(result["load"]),
        "",
        *table(("ns per run", *columns), rows),
        "",
        *paragraph(
            "By tracepoint; +- is half of the interval. With `another process` as the target these"
            " are the figures of everybody else's events; peers without -p trace everybody. The"
            f" statistics are in every figure themselves: {empty:.0f} ns, says an empty program."
            " In none of them is the kernel's call of a program:"
            f" {call['median']:.0f} ns ({call['low']:.0f} to {call['high']:.0f}) of CPU time, by"
            f" {STACKED} empty programs on each switch of the load."
        ),
    ]


def _show(found: dict[str, Any]) -> str:
    return f"{found['median']:.0f} +-{(found['high'] - found['low']) / 2:.0f}"


def goals(result: dict[str, Any]) -> list[Goal]:
    """Promises for one run of a program."""
    found = result["programs"]
    empty = found["empty"]["switch"]["median"]
    made: list[Goal] = []

    def add(what: str, limit: float, mode: str, pick: Callable[[dict[str, float]], float]) -> None:
        if mode in found:
            medians = {name: figure["median"] for name, figure in found[mode].items()}
            ns = pick(medians)
            made.append(at_most(f"{what} (net {ns - empty:.0f})", limit, ns, "ns"))

    add("not a target, slowest", 40, NEIGHBOUR.name, lambda ns: max(ns.values()))
    add("target, waking", 90, ALL_ROWS.name, lambda ns: ns["waking"])
    add("target, switch with a row", 110, ALL_ROWS.name, lambda ns: ns["switch"])
    return made
