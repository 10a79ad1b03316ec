"""What a stretch of a capture is made of, in figures that compare with those of another stretch.

Rates are per second of the stretch, times are summed over threads: two threads that are blocked
all the time make 2 s in each second. All of it is from recorded rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.acero  # or group_by imports it: later, as a user who may not be able to read it

from latrace.analysis.capture import Capture
from latrace.analysis.causes import CAUSES
from latrace.analysis.chunks import chunks, names, numbers
from latrace.analysis.frames import NamedStack, name_stacks
from latrace.analysis.sleep_calls import SleepCalls
from latrace.analysis.spike_windows import Window

IDLE_CALLS: Final = frozenset(
    {
        *("accept", "accept4", "clock_nanosleep", "nanosleep", "pause", "rt_sigtimedwait"),
        *("epoll_wait", "epoll_pwait", "epoll_pwait2", "poll", "ppoll", "select", "pselect6"),
        *("io_getevents", "rt_sigsuspend", "wait4", "waitid", "restart_syscall"),
    }
)
"""Calls in which a thread stays that has nothing to do. That it is there longer may well be
because others keep it waiting, but not why."""

_IDLE_FRAMES: Final = frozenset(
    {
        *("runtime.stopm", "runtime.stoplockedm", "runtime.findRunnable", "runtime.findrunnable"),
        *("runtime.sysmon", "runtime.templateThread", "os/signal.signal_recv"),
    }
)
"""Where a thread of Go stands that has no goroutine to run: in a futex, as in a lock."""

_COLLECTOR: Final = (
    *("runtime.gc", "runtime.bgsweep", "runtime.bgscavenge", "runtime.wbBuf", "runtime.sweepone"),
    *("runtime.(*sweepLocked)", "runtime.scanobject", "runtime.greyobject", "runtime.markroot"),
)
"""How the names of functions begin in which Go's collector works, in threads of its own and in
those that allocate."""

LATE_NS: Final = 1_000_000
"""Sleep calls later than this are counted as late."""

_LISTED = 10
_LEAST_NS_PER_S = 1_000_000  # 0.1 % of a thread's time: less is no reason for anything
_LEAST_GROWTH = 1.2
_LEAST_SAMPLES = 5
_MOSTLY = 0.5
_STACKS = 2000  # of one stretch that are looked at


@dataclass(slots=True)
class _Woken:
    """What one waker ended."""

    ns: int = 0
    stacks: dict[int, float] = field(default_factory=dict)
    """Where it stood when it did, by stacks.id: the time it stands for."""


@dataclass(slots=True)
class _Blocked:
    """What was blocked in one call, within a stretch."""

    ns: int = 0
    stacks: dict[int, float] = field(default_factory=dict)
    """By stacks.id: the time it stands for."""
    wakers: dict[tuple[str, int, int, str], _Woken] = field(default_factory=dict)
    """Who ended it, by (context, tid, tgid, comm)."""


@dataclass(slots=True)
class Timeline:
    """What threads did in a stretch, cut off at its edges."""

    blocked: dict[str, _Blocked] = field(default_factory=dict)
    """By system call; "": in none."""
    on_cpu_ns: int = 0
    samples: int = 0
    """How many that is made of."""
    on_cpu_stacks: dict[int, int] = field(default_factory=dict)


def read_timelines(capture: Capture, windows: Sequence[Window]) -> list[Timeline]:
    """Read what threads did in some stretches of time. Raises CaptureError for a damaged file."""
    found = [Timeline() for _ in windows]
    columns = (
        *("run_ns", "wait_ns", "blocked_ns", "syscall", "stack", "blocked_weight_ns"),
        *("waker_tid", "waker_tgid", "waker", "waker_ctx", "waker_stack"),
    )
    for table in chunks(capture, "waits", columns):
        woken = (numbers(table, "run_ns") - numbers(table, "wait_ns")).astype(np.int64)
        began = woken - numbers(table, "blocked_ns").astype(np.int64)
        for window, timeline in zip(windows, found, strict=True):
            inside = window.overlap_ns(began, woken)
            some = inside > 0
            if some.any():
                _add_blocked(timeline, table.filter(pa.array(some)), inside[some])
    for table in chunks(capture, "samples", ("ts_ns", "stack", "weight_ns")):
        at = numbers(table, "ts_ns").astype(np.int64)
        stack, weight = numbers(table, "stack", -1), numbers(table, "weight_ns")
        for window, timeline in zip(windows, found, strict=True):
            some = (at >= window.start_ns) & (at < window.end_ns)
            timeline.on_cpu_ns += int(weight[some].sum())
            timeline.samples += int(some.sum())
            _add_by(timeline.on_cpu_stacks, stack[some], weight[some])
    return found


def _add_blocked(timeline: Timeline, table: pa.Table, inside: npt.NDArray[Any]) -> None:
    calls, call_names = names(table, "syscall")
    comms, comm_names = names(table, "waker")
    contexts, context_names = names(table, "waker_ctx")
    # As much of what the stack stands for as lies in the stretch.
    part = inside / np.maximum(numbers(table, "blocked_ns"), 1)
    weight = numbers(table, "blocked_weight_ns") * part
    sums = (
        pa.table(
            {
                "call": calls,
                "context": contexts,
                "tid": numbers(table, "waker_tid"),
                "tgid": numbers(table, "waker_tgid"),
                "comm": comms,
                "stack": numbers(table, "stack", -1),
                "waker_stack": numbers(table, "waker_stack", -1),
                "ns": inside,
                "weight": weight,
            }
        )
        .group_by(["call", "context", "tid", "tgid", "comm", "stack", "waker_stack"])
        .aggregate([("ns", "sum"), ("weight", "sum")])
    )
    for line in sums.to_pylist():
        entry = timeline.blocked.setdefault(call_names[line["call"]], _Blocked())
        entry.ns += line["ns_sum"]
        who = (context_names[line["context"]], line["tid"], line["tgid"], comm_names[line["comm"]])
        woken = entry.wakers.setdefault(who, _Woken())
        woken.ns += line["ns_sum"]
        for stacks, stack in ((entry.stacks, line["stack"]), (woken.stacks, line["waker_stack"])):
            if stack >= 0 and line["weight_sum"]:
                stacks[stack] = stacks.get(stack, 0.0) + line["weight_sum"]


def _add_by(sums: dict[int, int], key: npt.NDArray[Any], weight: npt.NDArray[Any]) -> None:
    keys, which = np.unique(key, return_inverse=True)
    for number, ns in zip(keys.tolist(), np.bincount(which, weight, len(keys)), strict=True):
        sums[number] = sums.get(number, 0) + round(float(ns))


def describe(
    summary: Mapping[str, Any],
    calls: SleepCalls,
    window: Window,
    timeline: Timeline,
    *,
    late_ns: int = LATE_NS,
) -> dict[str, Any]:
    """Sum up a stretch: `parts.spike` and `parts.baseline` of the analysis, times in ns.

    `summary`: what `summarise` says of it; `calls`: the sleep calls in it that were later than
    `late_ns`. `per_s` holds what compares between stretches of different length; `on_cpu_ns` there
    is None where the stretch is too short for its samples.
    """
    waits, lost = summary["waits"], summary["retransmits"]
    seconds = max(window.seconds, 1e-9)
    late = {call.name: call.rows for call in calls.calls}
    return {
        "seconds": window.seconds,
        "waits": waits["count"],
        "wait_ns": waits["total_ns"],
        **{key: waits[key] for key in ("p50_ns", "p90_ns", "p99_ns", "p999_ns", "max_ns")},
        "by_cause_ns": waits["by_cause_ns"],
        "per_s": {
            "waits": waits["count"] / seconds,
            "wait_ns": waits["total_ns"] / seconds,
            "by_cause_ns": {cause: waits["by_cause_ns"][cause] / seconds for cause in CAUSES},
            "blocked_ns": {
                call: entry.ns / seconds
                for call, entry in sorted(
                    timeline.blocked.items(), key=lambda item: (-item[1].ns, item[0])
                )[:_LISTED]
            },
            "on_cpu_ns": timeline.on_cpu_ns / seconds if _sampled(window, timeline) else None,
            "segments": lost["segs"] / seconds,
            "lengthened_ns": lost["lengthened_ns"] / seconds,
            "sleeps_late": sum(late.values()) / seconds,
        },
        "sleeps": [
            {
                "call": line["call"],
                "count": line["count"],
                "late": late.get(line["call"], 0),
                "late_ns": late_ns,
                "p99_ns": line["overshoot_ns"]["p99"],
                "max_ns": line["overshoot_ns"]["max"],
            }
            for line in summary["sleeps"][:_LISTED]
        ],
        "retransmits": {
            key: lost[key] for key in ("count", "segs", "peers", "lengthened_count", "blocked_ns")
        }
        | {"lengthened_ns": lost["lengthened_ns"], "by_peer": lost["by_peer"][:_LISTED]},
    }


def _sampled(window: Window, timeline: Timeline) -> bool:
    """Whether the time on the CPU is known: a short stretch may lie between two samples."""
    return timeline.samples >= _LEAST_SAMPLES or window.seconds >= 1


# --- what grew ---------------------------------------------------------------------------------


def grown(
    spike: Mapping[str, Any], baseline: Mapping[str, Any] | None, timelines: Sequence[Timeline]
) -> list[dict[str, Any]]:
    """List what took more of each second in the spike than before, the most growth first.

    `what` is `wait` (`name`: the cause), `blocked` (the system call), `on_cpu`, or `lost` (time
    that lost TCP segments lengthened blocking calls by, which is a part of `blocked`). Times are
    ns per second. Without a baseline: all there is.
    """
    seconds = max(spike["seconds"], 1e-9)
    before_s = max(baseline["seconds"], 1e-9) if baseline else 1.0
    then = timelines[1].blocked if baseline else {}
    pairs: list[tuple[str, str, float, float]] = [
        (
            "wait",
            cause,
            spike["per_s"]["by_cause_ns"][cause],
            baseline["per_s"]["by_cause_ns"][cause] if baseline else 0.0,
        )
        for cause in CAUSES
    ]
    for call, entry in timelines[0].blocked.items():
        was = then[call].ns / before_s if call in then else 0.0
        pairs.append(("blocked", call, entry.ns / seconds, was))
    for what, key in (("on_cpu", "on_cpu_ns"), ("lost", "lengthened_ns")):
        now, was = spike["per_s"][key], baseline["per_s"][key] if baseline else 0.0
        if now is not None and was is not None:
            pairs.append((what, "", now, was))
    listed = [
        {"what": what, "name": name, "ns_per_s": now, "before_ns_per_s": was}
        for what, name, now, was in pairs
        if now - was >= _LEAST_NS_PER_S and now >= _LEAST_GROWTH * was
    ]
    return sorted(listed, key=_by_growth)


def _by_growth(line: Mapping[str, Any]) -> tuple[float, str, str]:
    return line["before_ns_per_s"] - line["ns_per_s"], line["what"], line["name"]


# A thread that is kept from the CPU keeps others waiting: of their time only a part is counted
# against its own, as they may be many.
_WEIGHT: Final = {"wait": 1.0, "lost": 1.0, "on_cpu": 0.5, "blocked": 0.25}


def foremost(listed: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Choose what is most likely the reason, of what grew; None: nothing tells.

    Calls in which idle threads stay (`idle`) are none, unless lost segments kept them there.
    """

    def weight(line: Mapping[str, Any]) -> float:
        grew: float = line["ns_per_s"] - line["before_ns_per_s"]
        return grew * _WEIGHT[line["what"]]

    return max((line for line in listed if not line["idle"]), key=weight, default=None)


def is_idle(capture: Capture, line: Mapping[str, Any], timeline: Timeline) -> bool:
    """Whether a line of what grew is of threads that were blocked as they had nothing to do."""
    if line["what"] != "blocked" or line["name"] in IDLE_CALLS:
        return bool(line["what"] == "blocked")
    entry = timeline.blocked.get(line["name"], _Blocked())
    return _share_of(capture, entry.stacks, _IDLE_FRAMES.__contains__) >= _MOSTLY


def _share_of(
    capture: Capture, sampled: Mapping[int, float], chosen: Callable[[str], bool]
) -> float:
    """Tell the share of some stacks' time that has a chosen function anywhere in it."""
    total = inside = 0.0
    for number, stack in name_stacks(capture, _heaviest(sampled)).items():
        total += sampled[number]
        if any(chosen(_plain(name)) for name in stack.user):
            inside += sampled[number]
    return inside / total if total else 0.0


def _is_collector(name: str) -> bool:
    return name == "runtime.GC" or name.startswith(_COLLECTOR)


def _plain(name: str) -> str:
    """A function's name without what the linker and the symbols add."""
    return name.split("+0x", 1)[0].removesuffix(".abi0")


def where(capture: Capture, line: Mapping[str, Any], timeline: Timeline) -> dict[str, Any]:
    """Tell where in the code something took its time, and who ended it, as far as that is known.

    `stack`: frames, leaf first; `function`: the one that most of it was in, "" where none was
    most; `waker`: who ended most of a blocking call, None where that was no thread; `collector`:
    the share of work on the CPU that was that of Go's garbage collector.
    """
    collector = 0.0
    sampled: Mapping[int, float] = {}
    waker = None
    if line["what"] == "on_cpu":
        sampled = timeline.on_cpu_stacks
        collector = _share_of(capture, sampled, _is_collector)
    elif line["what"] == "blocked" and line["name"] in timeline.blocked:
        entry = timeline.blocked[line["name"]]
        sampled = entry.stacks
        (context, tid, tgid, comm), woken = max(
            entry.wakers.items(), key=lambda item: (item[1].ns, -item[0][1])
        )
        if context == "task" and tid > 0:
            waker = {
                **{"tid": tid, "tgid": tgid, "comm": comm, "ns": woken.ns},
                "share": woken.ns / entry.ns if entry.ns else 0.0,
                "function": _most(capture, woken.stacks)[0],
            }
    function, stack = _most(capture, sampled)
    return {"stack": stack, "function": function, "waker": waker, "collector": collector}


def _most(capture: Capture, sampled: Mapping[int, float]) -> tuple[str, list[str]]:
    """Name the function that most of some stacks' time was in, and the heaviest stack."""
    weights: dict[tuple[str, ...], float] = {}
    functions: dict[str, float] = {}
    for number, stack in name_stacks(capture, _heaviest(sampled)).items():
        frames, function = _frames(stack), _function(stack)
        weights[frames] = weights.get(frames, 0.0) + sampled[number]
        functions[function] = functions.get(function, 0.0) + sampled[number]
    best = max(functions, key=lambda name: (functions[name], name), default="")
    heaviest: tuple[str, ...] = max(weights, key=lambda one: (weights[one], one), default=())
    most = functions.get(best, 0.0) >= sum(functions.values()) / 2
    return best if most else "", list(heaviest)


def _heaviest(sampled: Mapping[int, float]) -> list[int]:
    known = [number for number in sampled if number >= 0]
    return sorted(known, key=lambda number: (-sampled[number], number))[:_STACKS]


# Frames of the C library that every thread stands in that waits for a lock or a wake-up, and those
# of locks themselves: who took the lock is the question.
_LOCKS = (
    *("__futex", "futex_", "__lll_", "lll_", "___pthread_", "__pthread_", "pthread_"),
    *("__GI___lll", "__GI___futex", "__GI___pthread", "___lll_", "syscall", "__syscall"),
    *("std::mutex", "std::condition_variable", "std::sys", "std::__", "__gthread"),
    *("runtime.futex", "runtime.notesleep", "runtime.mPark", "runtime.lock", "parking_lot"),
)


def _function(stack: NamedStack) -> str:
    """Name the innermost function of the program's own that tells what it waited for or did."""
    own = [name for name in stack.user if name != "[unknown]"]
    told = [name for name in own if not name.startswith(_LOCKS)]
    return _plain((told or own or [stack.function])[0])


def _frames(stack: NamedStack) -> tuple[str, ...]:
    return stack.user or stack.work
