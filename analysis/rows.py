"""Add up what the recorded rows of `waits` tell beyond the exact totals: who, where, in which call.

Rows are details: there may be fewer than there were waits. Every sum here is of rows; the table
is read piece by piece, so memory does not grow with its length.
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
    "blocked_ns",
    "syscall",
    "stack",
    "weight_ns",
    "blocked_weight_ns",
)


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
class Rows:
    """Sums over all rows of `waits`."""

    all: Sum = field(default_factory=Sum)
    last_run_ns: int = 0
    hist: histogram.Counts = field(default_factory=histogram.empty)
    slot_ns: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(histogram.SLOTS))
    """Waiting time of the rows in each histogram slot."""
    kinds: dict[str, Sum] = field(default_factory=dict)
    threads: dict[tuple[int, int], Sum] = field(default_factory=dict)
    """By (tid, tgid)."""
    wakers: dict[tuple[str, int, int, str], Sum] = field(default_factory=dict)
    """By (context, tid, tgid, comm)."""
    syscalls: dict[str, Sum] = field(default_factory=dict)
    stacks: dict[int, StackSum] = field(default_factory=dict)
    """By stacks.id of rows that were sampled; -1 where the stack is missing."""

    def tail(self, over_ns: int) -> Sum:
        """Sum the rows above a quantile of the histogram."""
        (slot,) = histogram.slot_of([over_ns])
        return Sum(
            count=int(self.hist[slot + 1 :].sum()), wait_ns=int(self.slot_ns[slot + 1 :].sum())
        )


def scan(capture: Capture) -> Rows:
    """Read all rows once. Raises CaptureError for a damaged file."""
    rows = Rows()
    for table in capture.batches("waits", columns=_COLUMNS):
        _add(rows, table)
    return rows


def _add(rows: Rows, table: pa.Table) -> None:
    wait = _numbers(table, "wait_ns", 0)
    blocked = _numbers(table, "blocked_ns", 0)
    slots = histogram.slot_of(wait)
    rows.hist += np.bincount(slots, minlength=histogram.SLOTS).astype(np.uint64)
    rows.slot_ns += np.bincount(slots, wait, minlength=histogram.SLOTS)
    rows.last_run_ns = max(rows.last_run_ns, int(_numbers(table, "run_ns", 0).max(initial=0)))
    kinds, kind_names = _names(table, "kind")
    contexts, context_names = _names(table, "waker_ctx")
    comms, comm_names = _names(table, "waker")
    calls, call_names = _names(table, "syscall")
    keys = {
        "kind": kinds,
        "tid": _numbers(table, "tid", 0),
        "tgid": _numbers(table, "tgid", 0),
        "ctx": contexts,
        "waker_tid": _numbers(table, "waker_tid", 0),
        "waker_tgid": _numbers(table, "waker_tgid", 0),
        "comm": comms,
        "call": calls,
    }
    # Once over the rows by everything, then over what is left of them by each.
    parts = _parts(wait, blocked, keys)
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


def _add_stacks(rows: Rows, table: pa.Table) -> None:
    stack = _numbers(table, "stack", -1)
    weight = _numbers(table, "weight_ns", 0)
    blocked_weight = _numbers(table, "blocked_weight_ns", 0)
    sampled = (stack >= 0) | (weight > 0) | (blocked_weight > 0)
    parts = _parts(weight[sampled], blocked_weight[sampled], {"stack": stack[sampled]})
    for (number,), total in _groups(parts, ["stack"]):
        entry = rows.stacks.setdefault(number, StackSum())
        entry.samples += total.count
        entry.wait_ns += total.wait_ns
        entry.blocked_ns += total.blocked_ns


_SUMS = ("count", "wait_ns", "max_ns", "blocked", "blocked_ns")  # the fields of Sum
_AGGREGATES = ("wait_ns_count", "wait_ns_sum", "wait_ns_max", "blocked_sum", "blocked_ns_sum")


def _parts(
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
    grouped = parts.group_by(keys).aggregate(how)
    names = [*keys, *(f"{name}_{function}" for name, function in how)]
    for line in zip(*(grouped[name].to_pylist() for name in names), strict=True):
        yield line[: len(keys)], Sum(*line[len(keys) :])


def _numbers(table: pa.Table, name: str, absent: int) -> npt.NDArray[Any]:
    column = table[name].combine_chunks()
    filled: npt.NDArray[Any] = column.fill_null(absent).to_numpy(zero_copy_only=False)
    return filled


def _names(table: pa.Table, name: str) -> tuple[npt.NDArray[Any], dict[int, str]]:
    """Take a column of names apart: codes, and what they mean (-1: null, the empty name)."""
    column = table[name].combine_chunks()
    names = {code: text or "" for code, text in enumerate(column.dictionary.to_pylist())}
    codes: npt.NDArray[Any] = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return codes, {**names, -1: ""}
