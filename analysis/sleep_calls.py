"""Sleep calls: by how much they came back after the deadline asked for, and through what.

Counts, percentiles and the parts of all calls come from the in-kernel counters (the histograms
`overshoot:CALL` and `sleeps` in the manifest) where the capture has them, of all targets; the parts
of the slowest come from rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from latrace.analysis import histogram
from latrace.analysis.capture import Capture
from latrace.analysis.chunks import chunks, names, numbers, present
from latrace.analysis.selection import Selection

PARTS = ("entry", "timer", "run_queue", "return")
"""What an overshoot is made of, exactly, in the order of time."""

NOT_TOLD = -2
"""In the place of a row in `sleeps`: the capture does not say which."""

_METRIC = "overshoot:"
_COLUMNS = (
    "enter_ns",
    "exit_ns",
    "deadline_ns",
    "tid",
    "call",
    "deadline_from",
    "requested_ns",
    "overshoot_ns",
    *(f"{part}_ns" for part in PARTS),
)


@dataclass(slots=True)
class Call:
    """One kind of sleep call. Arrays have one entry for each chosen row that overshot."""

    name: str
    rows: int = 0
    early: int = 0
    """Rows that were woken before their deadline."""
    requested: list[npt.NDArray[np.int64]] = field(default_factory=list)
    """Of all chosen rows; -1: for ever."""
    overshoots: list[npt.NDArray[np.int64]] = field(default_factory=list)
    parts: list[npt.NDArray[np.int64]] = field(default_factory=list)
    """Shape (rows, 4)."""
    deadlines: dict[str, int] = field(default_factory=dict)
    """How many by where the deadline came from."""


class LateCalls:
    """The latest calls of each kind, to look up which of them a wait is part of."""

    def __init__(self, rows: npt.NDArray[np.intp], table: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take `rows`: of each row in `sleeps` the index of its call if it was late, else -1.

        `table`: the columns `tid`, `exit_ns` and `from_ns`, when the overshoot began, of all rows.
        """
        self._rows = rows
        late = np.flatnonzero(rows >= 0)
        self._ends = np.unique(table["exit_ns"][late])
        keys = self._keys(table["tid"][late], np.searchsorted(self._ends, table["exit_ns"][late]))
        order = np.argsort(keys, kind="stable")
        self._sorted, self._calls = keys[order], rows[late][order]
        self._from = table["from_ns"][late][order]

    def find(
        self, sleep: npt.NDArray[Any], tid: npt.NDArray[Any], run_ns: npt.NDArray[Any]
    ) -> npt.NDArray[np.intp]:
        """Tell of each wait the kind of late call it held up; -1: none.

        `sleep`: its row in `sleeps`, -1 none, or `NOT_TOLD`: then it is the call of the same
        thread in whose overshoot the wait ended. Calls of a thread do not overlap.
        """
        found = np.full(len(tid), -1, np.intp)
        told = (sleep >= 0) & (sleep < len(self._rows))
        found[told] = self._rows[sleep[told]]
        if not len(self._sorted):
            return found
        keys = self._keys(tid, np.searchsorted(self._ends, run_ns))
        place = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        next_of_thread = self._sorted[place] >> np.uint64(32) == keys >> np.uint64(32)
        inside = (
            (sleep == NOT_TOLD)
            & next_of_thread
            & (self._sorted[place] >= keys)
            & (self._from[place] < run_ns)
        )
        found[inside] = self._calls[place[inside]]
        return found

    @staticmethod
    def _keys(tid: npt.NDArray[Any], end: npt.NDArray[np.intp]) -> npt.NDArray[np.uint64]:
        """Pack the thread and the number of the end, so that they sort by both."""
        high = tid.astype(np.int32).view(np.uint32).astype(np.uint64) << np.uint64(32)
        packed: npt.NDArray[np.uint64] = high | end.astype(np.uint64)
        return packed


@dataclass(slots=True)
class SleepCalls:
    """All sleep calls of a part of a capture."""

    calls: list[Call] = field(default_factory=list)
    counts: list[histogram.Counts] = field(default_factory=list)
    """How many overshot by how much."""
    exact: list[bool] = field(default_factory=list)
    """Whether that was counted in the kernel, not from rows."""
    over_ns: list[int] = field(default_factory=list)
    """Above this a call counts as late."""
    counted: list[Mapping[str, Any]] = field(default_factory=list)
    """What the kernel counted of each: `count`, `early` and the parts; empty: nothing."""
    late: LateCalls | None = None


def read_sleep_calls(capture: Capture, selection: Selection) -> SleepCalls:
    """Read all sleep calls. Raises CaptureError for a damaged file."""
    found: dict[str, Call] = {}
    order: list[str] = []
    codes: list[npt.NDArray[np.intp]] = []
    columns: dict[str, list[npt.NDArray[Any]]] = {
        name: [] for name in ("tid", "exit_ns", "from_ns", "overshoot_ns")
    }
    start = capture.manifest.get("start_ns")
    for table in chunks(capture, "sleeps", _COLUMNS):
        overshoot = np.where(
            present(table, "overshoot_ns"), np.maximum(numbers(table, "overshoot_ns"), 0), -1
        )
        chosen = selection.mask(
            start_ns=start if isinstance(start, int) else 0,
            end_ns=numbers(table, "exit_ns"),
            tid=numbers(table, "tid"),
            took_ns=overshoot,
        )
        local, meanings = names(table, "call")
        code = np.full(len(local), -1, np.intp)
        for number in np.unique(local[chosen]).tolist():
            name = meanings[number]
            if name not in found:
                found[name] = Call(name)
                order.append(name)
            mine = chosen & (local == number)
            _add(found[name], table, mine, overshoot)
            code[mine] = order.index(name)
        codes.append(code)
        began = np.maximum(numbers(table, "enter_ns"), numbers(table, "deadline_ns"))
        for name, column in (("from_ns", began), ("overshoot_ns", overshoot)):
            columns[name].append(column)
        for name in ("tid", "exit_ns"):
            columns[name].append(numbers(table, name))
    counted = _counted(capture) if selection.everything else {}
    for name in counted:
        if name not in found:
            found[name] = Call(name)
            order.append(name)
    sleeps = SleepCalls(calls=[found[name] for name in order])
    if selection.everything:
        sleeps.counted = [_totals(capture, name) for name in order]
    _tell_late(sleeps, counted, selection)
    if codes:
        whole = {name: np.concatenate(parts) for name, parts in columns.items()}
        kind = np.concatenate(codes)
        over = np.array([*sleeps.over_ns, 0], np.int64)[kind]
        sleeps.late = LateCalls(np.where(whole["overshoot_ns"] > over, kind, -1), whole)
    return sleeps


def _totals(capture: Capture, call: str) -> dict[str, int]:
    """Read what the kernel counted of a call; empty where it did not."""
    found: Any = capture.manifest
    for key in ("sleeps", "calls", call):
        found = found.get(key) if isinstance(found, dict) else None
    names = ("count", "early", *(f"{part}_ns" for part in PARTS))
    if not isinstance(found, dict) or not all(isinstance(found.get(name), int) for name in names):
        return {}
    return {name: int(found[name]) for name in names}


def _add(
    call: Call, table: pa.Table, mine: npt.NDArray[np.bool_], overshoot: npt.NDArray[np.int64]
) -> None:
    late = mine & (overshoot >= 0)
    call.rows += int(mine.sum())
    call.early += int((mine & ~late).sum())
    call.requested.append(numbers(table, "requested_ns", -1)[mine])
    call.overshoots.append(overshoot[late])
    parts = np.stack([numbers(table, f"{part}_ns") for part in PARTS], axis=-1)
    call.parts.append(parts[late])
    codes, meanings = names(table, "deadline_from")
    for code, count in zip(*np.unique(codes[mine], return_counts=True), strict=True):
        source = meanings[int(code)]
        call.deadlines[source] = call.deadlines.get(source, 0) + int(count)


def _counted(capture: Capture) -> dict[str, histogram.Counts]:
    """Read the in-kernel histograms by call."""
    hist = capture.table("hist", columns=["metric", "lo_ns", "count"])
    codes, meanings = names(hist, "metric")
    low, count = numbers(hist, "lo_ns"), numbers(hist, "count")
    return {
        metric.removeprefix(_METRIC): histogram.from_buckets(
            low[codes == code], count[codes == code]
        )
        for code, metric in meanings.items()
        if metric.startswith(_METRIC) and (codes == code).any()
    }


def _tell_late(
    sleeps: SleepCalls, counted: Mapping[str, histogram.Counts], selection: Selection
) -> None:
    """Find the distribution of each call, and above what its slowest lie."""
    for call in sleeps.calls:
        slots = histogram.slot_of(_joined(call.overshoots).astype(np.uint64))
        rows = np.bincount(slots, minlength=histogram.SLOTS).astype(np.uint64)
        exact = counted.get(call.name)
        counts = rows if exact is None or int(exact.sum()) < len(slots) else exact
        over_ns = selection.over_ns
        if over_ns is None:
            over_ns = histogram.tail_over(counts, 0.99)
        sleeps.counts.append(counts)
        sleeps.exact.append(counts is exact)
        sleeps.over_ns.append(over_ns)


def describe(sleeps: SleepCalls, index: int) -> dict[str, Any]:
    """Sum up one kind of call: a line of `sleeps` in `latrace report --json`, without causes."""
    call, counts = sleeps.calls[index], sleeps.counts[index]
    overshoot = _joined(call.overshoots)
    parts = np.concatenate([np.zeros((0, len(PARTS)), np.int64), *call.parts])
    requested = _joined(call.requested)
    asked = np.sort(requested[requested >= 0])
    late = overshoot > sleeps.over_ns[index]
    overshot = int(counts.sum())
    counted = sleeps.counted[index] if sleeps.counted else {}
    made = {part: counted[f"{part}_ns"] for part in PARTS} if counted else _named(parts)
    p50, p90, p99 = histogram.quantiles(
        counts, (0.5, 0.9, 0.99), max_ns=_most(counts, int(overshoot.max(initial=0)))
    )
    return {
        "call": call.name,
        "count": counted["count"] if counted else call.rows + overshot - len(overshoot),
        "overshot": overshot,
        "rows": call.rows,
        "early": counted["early"] if counted else call.early,
        "exact": sleeps.exact[index],
        "requested_p50_ns": int(asked[(len(asked) - 1) // 2]) if len(asked) else -1,
        "deadline_from": dict(sorted(call.deadlines.items())),
        "overshoot_ns": {
            "p50": p50,
            "p90": p90,
            "p99": p99,
            "max": _most(counts, int(overshoot.max(initial=0))),
        },
        "parts_ns": made,
        "tail": {
            "over_ns": sleeps.over_ns[index],
            "count": _count_over(sleeps, index, int(late.sum())),
            "rows": int(late.sum()),
            "total_ns": int(overshoot[late].sum()),
            "parts_ns": _named(parts[late]),
        },
    }


def _count_over(sleeps: SleepCalls, index: int, rows: int) -> int:
    if not sleeps.exact[index]:
        return rows
    return histogram.count_over(sleeps.counts[index], sleeps.over_ns[index])


def _most(counts: histogram.Counts, rows_max: int) -> int:
    """Tell the greatest value: of the rows if it is in the last bucket, else that bucket's end."""
    _, high, _ = histogram.buckets(counts)
    if not len(high):
        return 0
    last = int(high[-1]) - 1
    low, _ = histogram.bounds(histogram.slot_of([last]))
    return rows_max if rows_max >= int(low[0]) else last


def _named(parts: npt.NDArray[np.int64]) -> dict[str, int]:
    return {part: int(ns) for part, ns in zip(PARTS, parts.sum(axis=0), strict=True)}


def _joined(arrays: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *arrays])
