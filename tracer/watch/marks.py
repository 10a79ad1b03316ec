"""What the kernel has counted at one moment, and what it counted between two.

The counters run from the first attach on. A bundle tells of its window alone: of the growth.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from latrace.analysis.histogram import bounds
from latrace.tracer.records import HIST, OVERSHOOT, THREAD
from latrace.tracer.shared import Shared


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """The counters at `at_ns` (CLOCK_MONOTONIC); all of them only ever grow."""

    at_ns: int
    epoch: int
    """Of the flight recorder then."""
    hist: npt.NDArray[np.void]
    """Shape (processes,) of dtype HIST: the histogram of each, over all CPUs."""
    tgids: tuple[int, ...]
    """Whose each is; -1: of all processes that have none of their own."""
    overshoots: npt.NDArray[np.void]
    """Shape (sleep calls,) of dtype OVERSHOOT."""
    counters: Mapping[str, int]
    threads: npt.NDArray[np.void]
    """Shape (threads,) of dtype THREAD: those alive."""
    segs: Mapping[int, int]
    """By network namespace: what the kernel counted as sent again."""
    overhead: Mapping[str, Any]
    """As a capture's manifest has it."""


def take(
    shared: Shared,
    slots: Mapping[int, int],
    threads: npt.NDArray[np.void],
    *,
    epoch: int,
    segs: Mapping[int, int],
    overhead: Mapping[str, Any],
) -> Mark:
    """Read the counters now. `slots`: histogram number → process."""
    numbers = [slot for slot in shared.used().tolist() if slot in slots]
    # What is counted while we look is on this side of the mark or on the other: a few at most.
    per_cpu, at_ns = shared.hist[numbers], time.monotonic_ns()
    overshoots, counters = shared.overshoots.copy(), shared.counters()
    hist = np.zeros(len(numbers), HIST)
    for name in HIST.names or ():
        add = np.max if name == "max_ns" else np.sum
        hist[name] = add(per_cpu[name], axis=1)
    return Mark(
        at_ns=at_ns,
        epoch=epoch,
        hist=hist,
        tgids=tuple(slots[number] for number in numbers),
        overshoots=overshoots,
        counters=counters,
        threads=threads,
        segs=segs,
        overhead=overhead,
    )


@dataclass(frozen=True, slots=True)
class LongestWaits:
    """The longest of the waits that have a row, by thread and by process, in ns."""

    threads: Mapping[int, int]
    processes: Mapping[int, int]


def grown_hist(start: Mark, end: Mark, longest: LongestWaits) -> npt.NDArray[np.void]:
    """The histograms of the time between two marks, shape (len(end.tgids),) of dtype HIST.

    The longest wait is exact if it was the longest ever, or has a row; else the highest it can
    have been by its bucket (at most 1.6 % more).
    """
    before = dict(zip(start.tgids, start.hist, strict=True))
    grown = end.hist.copy()
    for entry, tgid in zip(grown, end.tgids, strict=True):
        then = before.get(tgid)
        if then is None:
            continue
        ever = int(entry["max_ns"])
        _subtract(entry, then, HIST)
        entry["max_ns"] = ever
        if ever == int(then["max_ns"]):
            filled = np.flatnonzero(entry["slots"])
            if not len(filled):
                entry["max_ns"] = 0
                continue
            low, high = (int(bound) for bound in bounds(filled[-1]))
            most = min(high - 1, ever)
            row = longest.processes.get(tgid, 0)
            entry["max_ns"] = row if low <= row <= most else most
    return grown


def grown_overshoots(start: Mark, end: Mark) -> npt.NDArray[np.void]:
    """The sleep calls between two marks, shape (sleep calls,) of dtype OVERSHOOT."""
    grown = end.overshoots.copy()
    for entry, then in zip(grown, start.overshoots, strict=True):
        _subtract(entry, then, OVERSHOOT)
    return grown


def grown_counters(start: Mark, end: Mark) -> dict[str, int]:
    """What was counted between two marks."""
    return {name: value - start.counters[name] for name, value in end.counters.items()}


def grown_threads(
    start: Mark, ended: npt.NDArray[np.void], alive: npt.NDArray[np.void], longest: LongestWaits
) -> npt.NDArray[np.void]:
    """The threads between a mark and now, shape (n,) of dtype THREAD, with their growth since.

    `ended`: the last records of those that ended since; `alive`: of those that are there.
    """
    grown = np.concatenate([ended, alive])
    before = {
        (tid, start_ns): index
        for index, (tid, start_ns) in enumerate(
            zip(start.threads["tid"].tolist(), start.threads["start_ns"].tolist(), strict=True)
        )
    }
    for entry in grown:
        index = before.get((int(entry["tid"]), int(entry["start_ns"])))
        if index is None:
            continue
        then = start.threads[index]
        ever = int(entry["max_wait_ns"])
        for name in ("waits", "wait_ns", "blocked", "blocked_ns", "causes"):
            entry[name] -= then[name]
        if ever == int(then["max_wait_ns"]):
            entry["max_wait_ns"] = min(ever, longest.threads.get(int(entry["tid"]), 0))
    return grown


def grown_overhead(start: Mark, end: Mark) -> dict[str, Any]:
    """What tracing cost between two marks; what was scaled anew meanwhile is never below 0."""
    before = {each["name"]: each for each in start.overhead["programs"]}
    programs = []
    for each in end.overhead["programs"]:
        then = before.get(each["name"], {})
        grown = {
            name: max(0, each[name] - then.get(name, 0))
            for name in ("runs", "ns", "recursion_misses")
        }
        programs.append({"name": each["name"], **grown})
    self_cpu_s = end.overhead["self_cpu_s"] - start.overhead["self_cpu_s"]
    return {
        **end.overhead,
        "bpf_ns": sum(each["ns"] for each in programs),
        "programs": programs,
        "self_cpu_s": round(self_cpu_s, 6),
    }


def no_threads() -> npt.NDArray[np.void]:
    """None."""
    return np.zeros(0, THREAD)


def _subtract(entry: np.void, then: np.void, dtype: np.dtype[np.void]) -> None:
    for name in dtype.names or ():
        entry[name] -= then[name]
