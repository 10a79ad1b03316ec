"""Add up what the recorded rows of `waits` tell beyond the exact totals: who, where, in which call.

Rows are details: there may be fewer than there were waits. Every sum here is of rows; the table
is read piece by piece, so memory grows with the number of slow waits, not with its length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.acero  # or group_by imports it: later, as a user who may not be able to read it

from latrace.analysis import histogram
from latrace.analysis.capture import Capture
from latrace.analysis.causes import COLUMNS, Parts, grouped, no_parts, parts_of
from latrace.analysis.chunks import chunks, names, numbers
from latrace.analysis.selection import Selection
from latrace.analysis.sleep_calls import NOT_TOLD, LateCalls

_COLUMNS = (
    "run_ns",
    "wait_ns",
    "tid",
    "tgid",
    "kind",
    "waker_tid",
    "waker",
    "waker_tgid",
    "waker_ctx",
    "waker_wait_ns",
    "waker2_tid",
    "blocked_ns",
    "syscall",
    "stack",
    "weight_ns",
    "blocked_weight_ns",
    "sleep",
    "throttled_by",
    "wakeup_ns",
    "migrations",
    "idle_elsewhere_ns",
    *COLUMNS,
)
_KEYED = ("run_ns", "wait_ns", "tid")


@dataclass(slots=True)
class Sum:
    """Waits that have something in common. All times are in ns."""

    count: int = 0
    wait_ns: int = 0
    max_ns: int = 0
    blocked: int = 0
    blocked_ns: int = 0

    def add(self, other: Sum) -> None:
        """Take in more of the same."""
        self.count += other.count
        self.wait_ns += other.wait_ns
        self.max_ns = max(self.max_ns, other.max_ns)
        self.blocked += other.blocked
        self.blocked_ns += other.blocked_ns


@dataclass(slots=True)
class StackSum:
    """What one stack stands for: rows that carry it, and its shares of the exact times (ns)."""

    samples: int = 0
    wait_ns: int = 0
    blocked_ns: int = 0


@dataclass(slots=True)
class Waker:
    """Who ended blocks of slow waits, and how long it had waited itself before it did."""

    waits: int = 0
    wait_ns: int = 0
    """Of those it woke."""
    had_waited: int = 0
    waited_ns: int = 0
    """Its own waits for a CPU before: no part of theirs."""
    woken_by: dict[int, int] = field(default_factory=dict)
    """Its own wait (ns) by the thread that had woken it."""


@dataclass(slots=True)
class Tail:
    """The slow waits: those above a threshold."""

    count: int = 0
    wait_ns: int = 0
    parts: Parts = field(default_factory=no_parts)
    threads: dict[tuple[int, int], tuple[int, Parts]] = field(default_factory=dict)
    """By (tid, tgid): how many, and their parts."""
    wakers: dict[tuple[str, int, int, str], Waker] = field(default_factory=dict)
    """By (context, tid, tgid, comm)."""
    wakeup_ns: int = 0
    migrations: int = 0
    idle_elsewhere_ns: int = 0


@dataclass(slots=True)
class Throttled:
    """Waits that the CPU quota of one group held up."""

    waits: int = 0
    ns: int = 0
    tail_ns: int = 0


@dataclass(slots=True)
class Marks:
    """The waits whose slices are wanted, shape (marked,) each."""

    run_ns: npt.NDArray[np.uint64]
    tid: npt.NDArray[np.int32]
    tail: npt.NDArray[np.bool_]
    call: npt.NDArray[np.intp]
    """Inside a late sleep call of this kind; -1: no."""


@dataclass(slots=True)
class Survey:
    """What must be known before rows can be told slow: of the chosen rows, and of how many."""

    all: int = 0
    count: int = 0
    max_ns: int = 0
    hist: histogram.Counts = field(default_factory=histogram.empty)


@dataclass(slots=True)
class Rows:
    """Sums over the chosen rows of `waits`."""

    recorded: Sum = field(default_factory=Sum)
    """All rows, chosen or not: only the count and the waiting time."""
    all: Sum = field(default_factory=Sum)
    last_run_ns: int = 0
    parts: Parts = field(default_factory=no_parts)
    kinds: dict[str, Sum] = field(default_factory=dict)
    threads: dict[tuple[int, int], Sum] = field(default_factory=dict)
    """By (tid, tgid)."""
    wakers: dict[tuple[str, int, int, str], Sum] = field(default_factory=dict)
    """By (context, tid, tgid, comm)."""
    syscalls: dict[str, Sum] = field(default_factory=dict)
    stacks: dict[int, StackSum] = field(default_factory=dict)
    """By stacks.id of rows that were sampled; -1 where the stack is missing."""
    tail: Tail = field(default_factory=Tail)
    throttled: dict[str, Throttled] = field(default_factory=dict)
    """By cgroup."""
    calls: Parts = field(default_factory=lambda: np.zeros((0, len(COLUMNS)), np.uint64))
    """Parts of the waits inside late sleep calls, shape (calls, 8)."""
    marks: Marks | None = None


@dataclass(frozen=True, slots=True)
class Slow:
    """Which rows count as slow."""

    over_ns: int
    """Waits above this."""
    calls: int = 0
    """How many kinds of sleep call there are."""
    late: LateCalls | None = None
    """Which sleep calls count as slow."""


def survey(capture: Capture, selection: Selection) -> Survey:
    """Count the chosen rows by how long they waited. Raises CaptureError for a damaged file."""
    found = Survey()
    for table in chunks(capture, "waits", _KEYED):
        found.all += table.num_rows
        wait = numbers(table, "wait_ns")[_chosen(table, selection, capture)]
        found.count += len(wait)
        found.max_ns = max(found.max_ns, int(wait.max(initial=0)))
        slots = histogram.slot_of(wait)
        found.hist += np.bincount(slots, minlength=histogram.SLOTS).astype(np.uint64)
    return found


def scan(capture: Capture, selection: Selection, slow: Slow) -> Rows:
    """Read all rows once. Raises CaptureError for a damaged file."""
    rows = Rows(calls=np.zeros((slow.calls, len(COLUMNS)), np.uint64))
    marks: list[Marks] = []
    for table in chunks(capture, "waits", _COLUMNS):
        rows.recorded.count += table.num_rows
        rows.recorded.wait_ns += int(numbers(table, "wait_ns").sum())
        rows.last_run_ns = max(rows.last_run_ns, int(numbers(table, "run_ns").max(initial=0)))
        if not selection.everything:
            table = table.filter(pa.array(_chosen(table, selection, capture)))  # noqa: PLW2901
        if table.num_rows:
            _add(rows, table)
            marks.append(_mark(rows, table, slow, every=not selection.everything))
    rows.marks = _merge(marks)
    return rows


def _chosen(table: pa.Table, selection: Selection, capture: Capture) -> npt.NDArray[np.bool_]:
    start = capture.manifest.get("start_ns")
    return selection.mask(
        start_ns=start if isinstance(start, int) else 0,
        end_ns=numbers(table, "run_ns"),
        tid=numbers(table, "tid"),
        took_ns=numbers(table, "wait_ns"),
    )


def _add(rows: Rows, table: pa.Table) -> None:
    wait = numbers(table, "wait_ns")
    blocked = numbers(table, "blocked_ns")
    kinds, kind_names = names(table, "kind")
    contexts, context_names = names(table, "waker_ctx")
    comms, comm_names = names(table, "waker")
    calls, call_names = names(table, "syscall")
    keys = {
        "kind": kinds,
        "tid": numbers(table, "tid"),
        "tgid": numbers(table, "tgid"),
        "ctx": contexts,
        "waker_tid": numbers(table, "waker_tid"),
        "waker_tgid": numbers(table, "waker_tgid"),
        "comm": comms,
        "call": calls,
    }
    # Once over the rows by everything, then over what is left of them by each.
    parts = _agreeing(wait, blocked, keys)
    for _, total in _groups(parts, []):
        rows.all.add(total)
    for (kind,), total in _groups(parts, ["kind"]):
        rows.kinds.setdefault(kind_names[kind], Sum()).add(total)
    for (tid, tgid), total in _groups(parts, ["tid", "tgid"]):
        rows.threads.setdefault((tid, tgid), Sum()).add(total)
    for (ctx, tid, tgid, comm), total in _groups(parts, ["ctx", "waker_tid", "waker_tgid", "comm"]):
        key = (context_names[ctx], tid, tgid, comm_names[comm])
        rows.wakers.setdefault(key, Sum()).add(total)
    for (call,), total in _groups(parts, ["call"]):
        rows.syscalls.setdefault(call_names[call], Sum()).add(total)
    _add_stacks(rows, table)


# --- the slow ones -----------------------------------------------------------------------------


def _mark(rows: Rows, table: pa.Table, slow: Slow, *, every: bool) -> Marks:
    """Sum up by cause, look closer at the slow rows, and mark those whose slices are wanted."""
    parts = parts_of(table)
    rows.parts += parts.sum(axis=0, dtype=np.uint64)
    wait = numbers(table, "wait_ns")
    tail = wait > np.uint64(slow.over_ns)
    if tail.any():
        _add_tail(rows.tail, table.filter(pa.array(tail)), parts[tail])
    _add_throttled(rows, table, parts[:, 0], tail)
    run, tid = numbers(table, "run_ns"), numbers(table, "tid")
    call = np.full(len(wait), -1, np.intp)
    if slow.late is not None:
        call = slow.late.find(numbers(table, "sleep", NOT_TOLD), tid, run)
    late = call >= 0
    rows.calls += grouped(parts[late], call[late], slow.calls)
    wanted = np.flatnonzero(tail | late | every)
    return Marks(run[wanted], tid[wanted], tail[wanted], call[wanted])


def _add_tail(tail: Tail, table: pa.Table, parts: Parts) -> None:
    tail.count += table.num_rows
    tail.wait_ns += int(numbers(table, "wait_ns").sum())
    tail.parts += parts.sum(axis=0, dtype=np.uint64)
    for name in ("wakeup_ns", "migrations", "idle_elsewhere_ns"):
        setattr(tail, name, getattr(tail, name) + int(numbers(table, name).sum()))
    ids = np.stack([numbers(table, "tid"), numbers(table, "tgid")], axis=-1)
    threads, group = np.unique(ids, axis=0, return_inverse=True)
    group = group.reshape(-1)
    sums = grouped(parts, group, len(threads))
    counts = np.bincount(group, minlength=len(threads))
    for (tid, tgid), count, part in zip(threads.tolist(), counts.tolist(), sums, strict=True):
        before, known = tail.threads.get((tid, tgid), (0, no_parts()))
        tail.threads[tid, tgid] = before + count, known + part
    _add_tail_wakers(tail, table)


def _add_tail_wakers(tail: Tail, table: pa.Table) -> None:
    contexts, context_names = names(table, "waker_ctx")
    comms, comm_names = names(table, "waker")
    waited = numbers(table, "waker_wait_ns")
    keys = {
        "ctx": contexts,
        "tid": numbers(table, "waker_tid"),
        "tgid": numbers(table, "waker_tgid"),
        "comm": comms,
        "by": np.where(waited > 0, numbers(table, "waker2_tid"), 0),
    }
    # Its own wait in the place of the blocked time: summed up and counted in the same way.
    parts = _agreeing(numbers(table, "wait_ns"), waited, keys)
    for (ctx, tid, tgid, comm, by), total in _groups(parts, list(keys)):
        key = (context_names[ctx], tid, tgid, comm_names[comm])
        waker = tail.wakers.setdefault(key, Waker())
        waker.waits += total.count
        waker.wait_ns += total.wait_ns
        waker.had_waited += total.blocked
        waker.waited_ns += total.blocked_ns
        if by > 0:
            waker.woken_by[by] = waker.woken_by.get(by, 0) + total.blocked_ns


def _add_throttled(
    rows: Rows,
    table: pa.Table,
    throttled: npt.NDArray[np.uint64],
    tail: npt.NDArray[np.bool_],
) -> None:
    where = np.flatnonzero(throttled)
    if not len(where):
        return
    codes, meanings = names(table, "throttled_by")
    for code in np.unique(codes[where]).tolist():
        mine = where[codes[where] == code]
        entry = rows.throttled.setdefault(meanings[code], Throttled())
        entry.waits += len(mine)
        entry.ns += int(throttled[mine].sum())
        entry.tail_ns += int(throttled[mine][tail[mine]].sum())


def _merge(marks: list[Marks]) -> Marks | None:
    if not marks:
        return None
    return Marks(
        *(
            np.concatenate([getattr(mark, name) for mark in marks])
            for name in ("run_ns", "tid", "tail", "call")
        )
    )


# --- sums of rows that have something in common ------------------------------------------------


def _add_stacks(rows: Rows, table: pa.Table) -> None:
    stack = numbers(table, "stack", -1)
    weight = numbers(table, "weight_ns")
    blocked_weight = numbers(table, "blocked_weight_ns")
    sampled = (stack >= 0) | (weight > 0) | (blocked_weight > 0)
    parts = _agreeing(weight[sampled], blocked_weight[sampled], {"stack": stack[sampled]})
    for (number,), total in _groups(parts, ["stack"]):
        entry = rows.stacks.setdefault(number, StackSum())
        entry.samples += total.count
        entry.wait_ns += total.wait_ns
        entry.blocked_ns += total.blocked_ns


_SUMS = ("count", "wait_ns", "max_ns", "blocked", "blocked_ns")  # the fields of Sum
_AGGREGATES = ("wait_ns_count", "wait_ns_sum", "wait_ns_max", "blocked_sum", "blocked_ns_sum")


def _agreeing(
    wait: npt.NDArray[Any], blocked: npt.NDArray[Any], keys: dict[str, npt.NDArray[Any]]
) -> pa.Table:
    """Sum up rows that agree in all keys: a column for each key and each field of `Sum`."""
    columns = {**keys, "wait_ns": wait, "blocked": blocked > 0, "blocked_ns": blocked}
    return (
        pa.table(columns)
        .group_by(list(keys))
        .aggregate(
            [
                ("wait_ns", "count"),
                ("wait_ns", "sum"),
                ("wait_ns", "max"),
                ("blocked", "sum"),
                ("blocked_ns", "sum"),
            ]
        )
        .select([*keys, *_AGGREGATES])
        .rename_columns([*keys, *_SUMS])
    )


def _groups(parts: pa.Table, keys: list[str]) -> Iterator[tuple[tuple[int, ...], Sum]]:
    """Add up parts for each combination of some of their keys."""
    if not parts.num_rows:
        return
    how = [(name, "max" if name == "max_ns" else "sum") for name in _SUMS]
    sums = parts.group_by(keys).aggregate(how)
    columns = [*keys, *(f"{name}_{function}" for name, function in how)]
    for line in zip(*(sums[column].to_pylist() for column in columns), strict=True):
        yield line[: len(keys)], Sum(*line[len(keys) :])
