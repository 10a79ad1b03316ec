"""Who had the CPU while targets waited for it: `slices`, joined to the waits they are parts of.

Culprits are threads of other processes (`other`), of the same one (`own`), of the kernel
(`kthread`), and interrupts (`irq`, `softirq`). The wait's other causes have no slices: there was
nobody on the CPU, or the group was not allowed to run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.acero  # or group_by imports it: later, as a user who may not be able to read it

from latrace.analysis.capture import Capture
from latrace.analysis.chunks import chunks, names, numbers
from latrace.analysis.frames import NamedStack
from latrace.analysis.rows import Marks

CULPRITS = ("irq", "softirq", "kthread", "own", "other")
"""The causes that have slices."""

_COLUMNS = (
    "dur_ns",
    "tid",
    "tgid",
    "comm",
    "cgroup",
    "policy",
    "prio",
    "cause",
    "vector",
    "stack",
    "weight_ns",
    "victim_tid",
    "victim_run_ns",
)
_HOTTEST_SHARE = 0.5  # less of a culprit's time in one function does not characterise it


@dataclass(frozen=True, slots=True)
class Who:
    """One thread, or one kind of interrupt."""

    cause: str
    tid: int
    tgid: int
    comm: str
    vector: str


@dataclass(slots=True)
class Stay:
    """What one culprit did in some waits (ns)."""

    ns: int = 0
    how: dict[tuple[str, int, str], int] = field(default_factory=dict)
    """By (policy, prio, cgroup): the kernel's names and numbers."""
    stacks: dict[int, int] = field(default_factory=dict)
    """By stacks.id: the time it stands for."""

    def add(self, other: Stay) -> None:
        """Take in more of the same."""
        self.ns += other.ns
        for key, ns in other.how.items():
            self.how[key] = self.how.get(key, 0) + ns
        for number, ns in other.stacks.items():
            self.stacks[number] = self.stacks.get(number, 0) + ns


Culprits = dict[Who, Stay]


@dataclass(slots=True)
class Slices:
    """The culprits of all chosen waits, of the slow ones, and of those in late sleep calls."""

    all: Culprits = field(default_factory=dict)
    tail: Culprits = field(default_factory=dict)
    calls: dict[int, Culprits] = field(default_factory=dict)
    """By kind of sleep call."""


def scan_slices(capture: Capture, marks: Marks | None, *, every: bool) -> Slices:
    """Read all slices once; with `every` False only those of marked waits count.

    Raises CaptureError for a damaged file.
    """
    found = Slices()
    if marks is None:
        return found
    waits = _Waits(marks)
    for table in chunks(capture, "slices", _COLUMNS):
        wait = waits.find(numbers(table, "victim_run_ns"), numbers(table, "victim_tid"))
        known = wait >= 0
        _add(found.all, table if every else table.filter(pa.array(known)))
        if not known.any():
            continue
        marked = table.filter(pa.array(known))
        wait = wait[known]
        tail, call = marks.tail[wait], marks.call[wait]
        _add(found.tail, marked.filter(pa.array(tail)))
        for number in np.unique(call[call >= 0]).tolist():
            _add(found.calls.setdefault(number, {}), marked.filter(pa.array(call == number)))
    return found


class _Waits:
    """Finds marked waits by their key, exactly: the end of the wait and the thread."""

    def __init__(self, marks: Marks) -> None:
        self._ends = np.unique(marks.run_ns)
        keys = self._keys(np.searchsorted(self._ends, marks.run_ns), marks.tid)
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def find(self, run_ns: npt.NDArray[Any], tid: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
        """Tell the index of each wait among the marked ones; -1: it is none of them."""
        found = np.full(len(tid), -1, np.intp)
        if not len(self._ends):
            return found
        end = np.minimum(np.searchsorted(self._ends, run_ns), len(self._ends) - 1)
        near = np.flatnonzero(self._ends[end] == run_ns)
        keys = self._keys(end[near], tid[near])
        place = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        same = self._sorted[place] == keys
        found[near[same]] = self._order[place[same]]
        return found

    @staticmethod
    def _keys(end: npt.NDArray[np.intp], tid: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
        """Pack the number of the end and the thread id, 32 bits each."""
        low = tid.astype(np.int32).view(np.uint32).astype(np.uint64)
        packed: npt.NDArray[np.uint64] = (end.astype(np.uint64) << np.uint64(32)) | low
        return packed


def _add(culprits: Culprits, table: pa.Table) -> None:
    if not table.num_rows:
        return
    texts = {name: names(table, name) for name in ("cause", "comm", "vector", "policy", "cgroup")}
    keys = {name: codes for name, (codes, _) in texts.items()}
    keys |= {name: numbers(table, name) for name in ("tid", "tgid", "prio")}
    keys["stack"] = numbers(table, "stack", -1)
    sums = (
        pa.table(keys | {"dur_ns": numbers(table, "dur_ns"), "weight": numbers(table, "weight_ns")})
        .group_by(list(keys))
        .aggregate([("dur_ns", "sum"), ("weight", "sum")])
    )
    for line in sums.to_pylist():
        cause, comm, vector, policy, cgroup = (
            meanings[line[name]] for name, (_, meanings) in texts.items()
        )
        who = Who(cause, line["tid"], line["tgid"], comm, vector)
        how = (policy, line["prio"], cgroup)
        weight = line["weight_sum"]
        stacks = {line["stack"]: weight} if line["stack"] >= 0 and weight else {}
        ns = line["dur_ns_sum"]
        culprits.setdefault(who, Stay()).add(Stay(ns, {how: ns}, stacks))


# --- for people and machines -------------------------------------------------------------------


def itemised(culprits: Culprits) -> dict[str, int]:
    """Sum up by cause what has a slice, ns."""
    sums = dict.fromkeys(CULPRITS, 0)
    for who, stay in culprits.items():
        sums[who.cause] = sums.get(who.cause, 0) + stay.ns
    return sums


def by_process(culprits: Culprits, known: Mapping[int, str]) -> dict[Who, tuple[Stay, int]]:
    """Put the threads of each process together, and tell how many there were.

    The name is that of the first thread, of `known` processes, or of the thread that had the CPU
    longest; of several names of one thread (a shell that became a program) the one that it had the
    CPU longest under. Interrupts are put together by kind.
    """
    members: dict[tuple[str, int, str], dict[Who, Stay]] = {}
    for who, stay in culprits.items():
        members.setdefault((who.cause, who.tgid, who.vector), {})[who] = stay
    merged = {}
    for (cause, tgid, vector), threads in members.items():
        whole = Stay()
        for stay in threads.values():
            whole.add(stay)
        by_time = sorted(threads, key=lambda who: (-threads[who].ns, who.tid))
        longest = by_time[0]
        first = next((who.comm for who in by_time if who.tid == tgid), "")
        comm = first or known.get(tgid, "") or longest.comm
        tid = longest.tid if len({who.tid for who in threads}) == 1 else tgid
        who = Who(cause, tid, tgid, comm, vector)
        merged[who] = (whole, len({who.tid for who in threads}))
    return merged


def longest_first(culprits: Iterable[tuple[Who, Stay]]) -> list[tuple[Who, Stay]]:
    """Sort by time."""
    return sorted(culprits, key=lambda item: (-item[1].ns, item[0].tid, item[0].vector))


def stack_numbers(culprits: Iterable[Stay]) -> Iterator[int]:
    """List the stacks that `entry` needs named."""
    for stay in culprits:
        yield from stay.stacks


def entry(
    who: Who,
    stay: Stay,
    whole_ns: int,
    stacks: Mapping[int, NamedStack],
    *,
    everywhere: Stay | None = None,
) -> dict[str, Any]:
    """Describe a culprit: one line of `culprits` in `latrace report --json`.

    `whole_ns`: what its share is of; `stacks`: see `stack_numbers`; `everywhere`: what it did in
    all waits, whose stacks are taken when these have none.
    """
    scheduled: dict[tuple[str, int], int] = {}
    cgroups: dict[str, int] = {}
    for (policy, prio, cgroup), ns in stay.how.items():
        scheduled[policy, prio] = scheduled.get((policy, prio), 0) + ns
        cgroups[cgroup] = cgroups.get(cgroup, 0) + ns
    hows = sorted(scheduled.items(), key=lambda how: (-how[1], how[0]))
    sampled = stay.stacks or (everywhere.stacks if everywhere else {})
    hottest = max(sampled, key=lambda number: (sampled[number], -number), default=-1)
    stack = stacks.get(hottest, NamedStack())
    return {
        "cause": who.cause,
        "own": who.cause == "own",
        "tid": who.tid,
        "tgid": who.tgid,
        "comm": who.comm,
        "vector": who.vector,
        "ns": stay.ns,
        "share": stay.ns / whole_ns if whole_ns else 0.0,
        "all_ns": everywhere.ns if everywhere else stay.ns,
        "policy": hows[0][0][0] if hows else "",
        "prio": hows[0][0][1] if hows and hows[0][0][0] else None,
        "scheduled": [
            {"policy": policy, "prio": prio, "ns": ns} for (policy, prio), ns in hows if policy
        ],
        "cgroup": max(cgroups, key=lambda cgroup: (cgroups[cgroup], cgroup), default=""),
        "stack": [*stack.kernel, *stack.user],
        "kernel_frames": len(stack.kernel),
        "work": list(stack.work),
        "left": stack.left,
        "mostly": _mostly(sampled, stacks, of_kernel=who.cause == "kthread"),
    }


def _mostly(
    sampled: Mapping[int, int], stacks: Mapping[int, NamedStack], *, of_kernel: bool
) -> dict[str, Any] | None:
    """Name the function that a culprit spent most of its time in, if there is such a one.

    A stack shows where a thread was when it left the CPU. One that blocked does not show what it
    did before, except that a kernel thread has but one thing to do.
    """
    functions: dict[str, int] = {}
    for number, weight in sampled.items():
        stack = stacks.get(number, NamedStack())
        name = stack.function if stack.left == "preempted" or of_kernel else ""
        functions[name] = functions.get(name, 0) + weight
    total = sum(functions.values())
    function = max(functions, key=lambda name: (functions[name], name), default="")
    if not function or functions[function] < _HOTTEST_SHARE * total:
        return None
    return {"function": function, "share": functions[function] / total}
