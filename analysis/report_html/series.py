"""Add up the rows of a capture for the plots: their size does not grow with the capture's.

Tables are read piece by piece; what is kept is a grid of times and latencies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from latrace.analysis import histogram
from latrace.analysis.capture import Capture
from latrace.analysis.causes import CAUSES, COLUMNS, parts_of
from latrace.analysis.chunks import chunks, names, numbers, present
from latrace.analysis.selection import Selection

TIMES: Final = 192
"""Columns of time."""
FINEST: Final = 6
"""Rows of latency to each doubling."""
LOWEST: Final = 7  # 2**7 ns: all that is shorter lies in the first row
_HIGHEST = 43  # 2**43 ns: 2 h 26 min
LATENCIES: Final = (_HIGHEST - LOWEST) * FINEST
_CALLS = 64  # of sleep calls: a capture names no more, a forged one may

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The stretch of time that the plots show."""

    capture_ns: int
    """When the capture began, CLOCK_MONOTONIC."""
    begin_ns: int
    """From so long after that."""
    end_ns: int
    """Until so long after that."""

    @property
    def bin_ns(self) -> float:
        """How long a column of time is."""
        return max(1, self.end_ns - self.begin_ns) / TIMES

    def place(self, at_ns: npt.NDArray[Any]) -> Floats:
        """Tell in which column of time moments lie: from 0 to TIMES, fractions included."""
        start = self.capture_ns + self.begin_ns
        # Signed, and exact: as a float the moment itself would be some hundred ns off.
        offset = at_ns.astype(np.int64) - np.int64(start)
        return np.clip(offset / self.bin_ns, 0.0, float(TIMES))


@dataclass(slots=True)
class Waits:
    """The recorded waits."""

    grid: Counts = field(default_factory=lambda: np.zeros((TIMES, LATENCIES), np.int64))
    """How many ended then, and were that long."""
    waiting: Floats = field(default_factory=lambda: np.zeros((len(CAUSES), TIMES)))
    """How many threads waited then, on average, by cause."""
    hist: histogram.Counts = field(default_factory=histogram.empty)
    has_causes: bool = False
    rows: int = 0


@dataclass(slots=True)
class Sleeps:
    """The recorded sleep calls that asked for a time and overshot it: a grid for each call."""

    grids: dict[str, Counts] = field(default_factory=dict)
    """By call: how many asked for so long (first axis) and overshot by so much, in rows of
    latency."""


def latency_row(ns: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Tell in which row of latency a time lies."""
    doublings = np.log2(np.maximum(ns.astype(np.float64), 1.0)) - LOWEST
    rows: npt.NDArray[np.intp] = np.clip(doublings * FINEST, 0, LATENCIES - 1).astype(np.intp)
    return rows


def read_waits(capture: Capture, window: Window, selection: Selection) -> Waits:
    """Read the waits of a selection once. Raises CaptureError for a damaged file."""
    waits = Waits()
    ends = np.zeros((len(CAUSES), 2, TIMES + 1))  # of the waits: how many, and where they lie
    for table in chunks(capture, "waits", ("run_ns", "wait_ns", "tid", *COLUMNS)):
        run, wait = numbers(table, "run_ns"), numbers(table, "wait_ns")
        chosen = selection.mask(
            start_ns=window.capture_ns, end_ns=run, tid=numbers(table, "tid"), took_ns=wait
        )
        run, wait = run[chosen].astype(np.uint64), wait[chosen].astype(np.uint64)
        waits.rows += len(run)
        waits.hist += np.bincount(histogram.slot_of(wait), minlength=histogram.SLOTS).astype(
            np.uint64
        )
        waits.has_causes |= any(bool(present(table, column).any()) for column in COLUMNS)
        end, start = window.place(run), window.place(run - np.minimum(wait, run))
        cell = np.minimum(end.astype(np.intp), TIMES - 1) * LATENCIES + latency_row(wait)
        waits.grid += np.bincount(cell, minlength=TIMES * LATENCIES).reshape(TIMES, LATENCIES)
        part = parts_of(table)[chosen] / np.maximum(wait, 1)[:, None]
        for sign, place in ((1.0, start), (-1.0, end)):
            column = place.astype(np.intp)
            for cause in range(len(CAUSES)):
                weight = sign * part[:, cause]
                ends[cause, 0] += np.bincount(column, weight, TIMES + 1)
                ends[cause, 1] += np.bincount(column, weight * place, TIMES + 1)
    waits.waiting = _averages(ends)
    return waits


def _averages(ends: Floats) -> Floats:
    """Turn where waits begin and end into how many there are in each column of time, on average.

    A wait that begins at place s adds (x - s) to the time waited up to the edge x, one that ends
    at e takes (x - e) off again: two cumulated sums give that time for all edges.
    """
    edges = np.arange(1, TIMES + 1)
    many, placed = np.cumsum(ends[:, 0, :TIMES], axis=1), np.cumsum(ends[:, 1, :TIMES], axis=1)
    waited = many * edges - placed
    return np.maximum(np.diff(waited, axis=1, prepend=0.0), 0.0)


def read_sleeps(capture: Capture, window: Window, selection: Selection) -> Sleeps:
    """Read the sleep calls of a selection once. Raises CaptureError for a damaged file."""
    sleeps = Sleeps()
    columns = ("exit_ns", "tid", "call", "requested_ns", "overshoot_ns")
    for table in chunks(capture, "sleeps", columns):
        late = numbers(table, "overshoot_ns").astype(np.int64)
        asked = numbers(table, "requested_ns").astype(np.int64)
        chosen = selection.mask(
            start_ns=window.capture_ns,
            end_ns=numbers(table, "exit_ns"),
            tid=numbers(table, "tid"),
            took_ns=late,
        )
        chosen &= present(table, "overshoot_ns") & (asked > 0)
        codes, meanings = names(table, "call")
        cell = latency_row(np.maximum(asked, 1)) * LATENCIES + latency_row(np.maximum(late, 1))
        for code in np.unique(codes[chosen]):
            call = meanings[int(code)]
            if call not in sleeps.grids and len(sleeps.grids) >= _CALLS:
                continue
            of_call = np.bincount(cell[chosen & (codes == code)], minlength=LATENCIES**2)
            grid = sleeps.grids.setdefault(call, np.zeros((LATENCIES, LATENCIES), np.int64))
            grid += of_call.reshape(LATENCIES, LATENCIES)
    return sleeps


def exact_histogram(capture: Capture) -> histogram.Counts:
    """Give the kernel's own histogram of all waits; empty if it was never written."""
    table = capture.hist
    table = table.filter(pc.equal(pc.cast(table["metric"], pa.utf8()), "wait"))
    if not table.num_rows:
        return histogram.empty()
    return histogram.from_buckets(
        numbers(table, "lo_ns").astype(np.uint64), numbers(table, "count").astype(np.uint64)
    )
