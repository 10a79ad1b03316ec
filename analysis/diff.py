"""Two captures side by side, and which differences are more than chance.

Figures come from the in-kernel counters where these have them; how far they may be off comes from
how they scatter over the recorded rows (see `latrace.analysis.intervals`). Threads and culprits
are matched by name: numbers are others in every run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from latrace.analysis import histogram
from latrace.analysis.capture import Capture
from latrace.analysis.causes import CAUSES, parts_of
from latrace.analysis.chunks import chunks, names, numbers, present
from latrace.analysis.intervals import (
    BLOCKS,
    CONFIDENCE,
    Interval,
    Rate,
    Values,
    design_effect,
    quantile,
    rate,
)
from latrace.analysis.schema import SCHEMA_VERSION

QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
METHOD: Final = (
    f"{100 * CONFIDENCE:.0f} % intervals. Quantiles: binomial order statistics of the exact"
    " histogram, the count divided by the design effect of their clusters in time; they differ when"
    f" the intervals do not overlap. Rates: the scatter over {BLOCKS} parts of the capture; they"
    " differ by more than both errors together."
)

_OVERSHOOT: Final = "overshoot:"
_TOTALS: Final = ("waits", "wait_ns", "max_ns", "blocked_ns")

Name: TypeAlias = tuple[str, ...]


def compare(a: Capture, b: Capture, *, top: int = 10) -> dict[str, Any]:
    """Compare two captures: times in ns, rates per second of the capture.

    Everything in it can be written as JSON. Of threads and culprits the `top` with the greatest
    rate in either. `differs` is None where there is too little to tell.

    Raises CaptureError for a damaged file.
    """
    sides = (_read(a), _read(b))
    return {
        "schema": SCHEMA_VERSION,
        "method": METHOD,
        "a": _about(sides[0]),
        "b": _about(sides[1]),
        "quantiles": _quantiles(sides, "wait"),
        "max_ns": {"a": sides[0].totals["max_ns"], "b": sides[1].totals["max_ns"]},
        "rates": _rates(sides, "rate", ("waits", "waited", "blocked", "on_cpu")),
        "causes": _rates(sides, "cause", CAUSES),
        "culprits": _top(sides, "culprit", ("cause", "comm"), top),
        "threads": _top(sides, "thread", ("comm",), top),
        "sleeps": [
            {"call": metric.removeprefix(_OVERSHOOT), "quantiles": _quantiles(sides, metric)}
            for metric in sorted({*sides[0].hists, *sides[1].hists} - {"wait"})
        ],
    }


# --- one capture -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Side:
    """What is compared of one capture."""

    capture: Capture
    start_ns: int
    end_ns: int
    totals: dict[str, int] = field(default_factory=dict)
    hists: dict[str, histogram.Counts] = field(default_factory=dict)
    sums: dict[Name, int] = field(default_factory=dict)
    """By kind and name: the exact sum."""
    blocks: dict[Name, Values] = field(default_factory=dict)
    """The same over the rows of each part of the capture."""
    over: dict[Name, Values] = field(default_factory=dict)
    """By metric and quantile: how many rows of each part lie above it."""
    counted: dict[str, Values] = field(default_factory=dict)
    """By metric: how many rows each part has."""

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9

    def part_of(self, times_ns: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
        """Tell in which of the parts each time lies."""
        length = max(1, self.end_ns - self.start_ns) / BLOCKS
        since = times_ns.astype(np.int64) - self.start_ns
        return np.clip((since / length).astype(np.intp), 0, BLOCKS - 1)

    def add(self, name: Name, part: npt.NDArray[np.intp], weight: npt.NDArray[Any]) -> None:
        """Add rows to the parts of the capture they lie in."""
        held = self.blocks.setdefault(name, np.zeros(BLOCKS))
        held += np.bincount(part, weight, BLOCKS)

    def rate(self, name: Name) -> Rate:
        blocks = self.blocks.get(name)
        total = self.sums.get(name, 0)
        if blocks is None and not total and self.counted.get("wait") is not None:
            blocks = np.zeros(BLOCKS)  # not there at all: that is known
        return rate(total, blocks, self.seconds)

    def quantile(self, metric: str, name: str) -> Interval | None:
        counts = self.hists.get(metric)
        if counts is None:
            return None
        over, of = self.over.get((metric, name)), self.counted.get(metric)
        effect = 1.0 if over is None or of is None else design_effect(over, of)
        return quantile(counts, QUANTILES[name], max_ns=self._longest(metric), effect=effect)

    def _longest(self, metric: str) -> int:
        longest = self.totals["max_ns"] if metric == "wait" else 0
        return longest or 2**64 - 1


def _read(capture: Capture) -> _Side:
    start = _number(capture.manifest.get("start_ns"))
    end = _number(capture.manifest.get("end_ns"))
    last = pc.max(capture.table("waits", columns=["run_ns"])["run_ns"]).as_py() or start
    side = _Side(capture, start, end if end > start else max(last, start))
    _add_totals(side)
    _add_histograms(side)
    _add_waits(side)
    _add_slices(side)
    _add_samples(side)
    _add_sleeps(side)
    return side


def _number(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _add_totals(side: _Side) -> None:
    totals = side.capture.totals
    for name in _TOTALS:
        values = numbers(totals, name)
        side.totals[name] = int(values.max(initial=0) if name == "max_ns" else values.sum())
    for name, total in (("waits", "waits"), ("waited", "wait_ns"), ("blocked", "blocked_ns")):
        side.sums["rate", name] = side.totals[total]
    for cause, ns in zip(CAUSES, parts_of(totals).sum(axis=0), strict=True):
        side.sums["cause", cause] = int(ns)
    threads = side.capture.threads
    codes, comms = names(threads, "comm")
    for code, ns in zip(codes, numbers(threads, "wait_ns"), strict=True):
        key = ("thread", comms[code])
        side.sums[key] = side.sums.get(key, 0) + int(ns)


def _add_histograms(side: _Side) -> None:
    hist = side.capture.hist
    codes, metrics = names(hist, "metric")
    low, count = numbers(hist, "lo_ns"), numbers(hist, "count")
    for code, metric in metrics.items():
        rows = codes == code
        if rows.any() and (metric == "wait" or metric.startswith(_OVERSHOOT)):
            side.hists[metric] = histogram.from_buckets(low[rows], count[rows])


def _add_waits(side: _Side) -> None:
    threads = side.capture.threads
    codes, comms = names(threads, "comm")
    comm_of = dict(zip(numbers(threads, "tid").tolist(), codes.tolist(), strict=True))
    uncounted = not side.totals["waits"]  # cut off before the counters were written
    columns = ["run_ns", "wait_ns", "tid", "blocked_ns", *(f"{cause}_ns" for cause in CAUSES)]
    for table in chunks(side.capture, "waits", columns):
        part, wait = side.part_of(numbers(table, "run_ns")), numbers(table, "wait_ns")
        side.add(("rate", "waits"), part, np.ones(len(part)))
        side.add(("rate", "waited"), part, wait)
        side.add(("rate", "blocked"), part, numbers(table, "blocked_ns"))
        for cause, ns in zip(CAUSES, parts_of(table).T, strict=True):
            side.add(("cause", cause), part, ns)
        tids, which = np.unique(numbers(table, "tid"), return_inverse=True)
        named = np.array([comm_of.get(tid, -1) for tid in tids.tolist()])[which]
        for code in np.unique(named):
            rows = named == code
            side.add(("thread", comms[int(code)]), part[rows], wait[rows])
        if uncounted:
            counts = side.hists.setdefault("wait", histogram.empty())
            np.add.at(counts, histogram.slot_of(wait), np.uint64(1))
            side.totals["max_ns"] = max(side.totals["max_ns"], int(wait.max(initial=0)))
    if uncounted:
        _sums_from_rows(side, ("rate", "cause", "thread"))
        side.totals["waits"] = side.sums.get(("rate", "waits"), 0)
    _count_over(side, "wait", "waits", "run_ns", "wait_ns")


def _add_slices(side: _Side) -> None:
    columns = ["dur_ns", "comm", "cause", "vector", "victim_run_ns"]
    for table in chunks(side.capture, "slices", columns):
        part, dur = side.part_of(numbers(table, "victim_run_ns")), numbers(table, "dur_ns")
        coded = [names(table, column) for column in ("cause", "comm", "vector")]
        keys, which = np.unique(
            np.stack([codes for codes, _ in coded], axis=1), axis=0, return_inverse=True
        )
        which = which.reshape(-1)
        for number, key in enumerate(keys.tolist()):
            cause, comm, vector = (
                meaning[code] for (_, meaning), code in zip(coded, key, strict=True)
            )
            rows = which == number
            side.add(("culprit", cause, comm or vector), part[rows], dur[rows])
    _sums_from_rows(side, ("culprit",))


def _add_samples(side: _Side) -> None:
    for table in chunks(side.capture, "samples", ["ts_ns", "weight_ns"]):
        part = side.part_of(numbers(table, "ts_ns"))
        side.add(("rate", "on_cpu"), part, numbers(table, "weight_ns"))
    if ("rate", "on_cpu") in side.blocks:
        side.sums["rate", "on_cpu"] = round(float(side.blocks["rate", "on_cpu"].sum()))


def _add_sleeps(side: _Side) -> None:
    for metric in side.hists:
        if metric != "wait":
            call = metric.removeprefix(_OVERSHOOT)
            _count_over(side, metric, "sleeps", "exit_ns", "overshoot_ns", call=call)


def _count_over(
    side: _Side, metric: str, table: str, time: str, value: str, *, call: str = ""
) -> None:
    """Count the rows of each part of the capture that lie above each quantile of the whole."""
    counts = side.hists.get(metric)
    if counts is None:
        return
    marks = histogram.quantiles(counts, QUANTILES.values(), max_ns=2**64 - 1)
    columns = [time, value, *(["call"] if call else [])]
    for rows in chunks(side.capture, table, columns):
        wanted = present(rows, value)
        if call:
            codes, calls = names(rows, "call")
            wanted &= np.isin(codes, [code for code, name in calls.items() if name == call])
        part, values = side.part_of(numbers(rows, time))[wanted], numbers(rows, value)[wanted]
        counted = side.counted.setdefault(metric, np.zeros(BLOCKS))
        counted += np.bincount(part, minlength=BLOCKS)
        for name, mark in zip(QUANTILES, marks, strict=True):
            over = side.over.setdefault((metric, name), np.zeros(BLOCKS))
            over += np.bincount(part[values > mark], minlength=BLOCKS)


def _sums_from_rows(side: _Side, kinds: Iterable[str]) -> None:
    for name, blocks in side.blocks.items():
        if name[0] in kinds:
            side.sums[name] = round(float(blocks.sum()))


# --- side by side ------------------------------------------------------------------------------


def _about(side: _Side) -> dict[str, Any]:
    manifest = side.capture.manifest
    quality = manifest.get("quality")
    quality = quality if isinstance(quality, dict) else {}
    targets = manifest.get("targets")
    culprits = sum(ns for name, ns in side.sums.items() if name[0] == "culprit")
    whose = sum(
        side.sums["cause", cause] for cause in ("irq", "softirq", "kthread", "own", "other")
    )
    return {
        "path": str(side.capture.path),
        "targets": [each for each in targets if isinstance(each, dict)]
        if isinstance(targets, list)
        else [],
        "host": str(manifest.get("host", "")),
        "kernel": str(manifest.get("kernel", "")),
        "duration_s": side.seconds,
        "complete": side.capture.complete,
        "waits": side.totals["waits"],
        "rows": int(side.counted["wait"].sum()) if "wait" in side.counted else 0,
        "lost_events": _number(quality.get("lost_events")),
        "degraded": bool(quality.get("degraded")),
        "culprits_known": min(1.0, culprits / whose) if whose else None,
    }


def _quantiles(sides: Sequence[_Side], metric: str) -> list[dict[str, Any]]:
    listed = []
    for name in QUANTILES:
        a, b = (side.quantile(metric, name) for side in sides)
        listed.append(
            {
                "name": name,
                "a": _interval(a),
                "b": _interval(b),
                "differs": None if a is None or b is None else a.apart(b),
            }
        )
    return listed


def _interval(one: Interval | None) -> dict[str, int | None] | None:
    return None if one is None else {"ns": one.value, "low_ns": one.low, "high_ns": one.high}


def _rates(sides: Sequence[_Side], kind: str, wanted: Iterable[str]) -> list[dict[str, Any]]:
    return [_row(sides, (kind, name), {"name": name}) for name in wanted]


def _row(sides: Sequence[_Side], name: Name, named: Mapping[str, str]) -> dict[str, Any]:
    a, b = (side.rate(name) for side in sides)
    return {**named, "a": a.as_json(), "b": b.as_json(), "differs": a.apart(b)}


def _top(
    sides: Sequence[_Side], kind: str, fields: Sequence[str], top: int
) -> list[dict[str, Any]]:
    found = {name for side in sides for name in side.sums if name[0] == kind}

    def greatest(name: Name) -> float:
        return max(side.rate(name).per_s for side in sides)

    chosen = sorted(found, key=lambda name: (-greatest(name), name))[:top]
    return [_row(sides, name, dict(zip(fields, name[1:], strict=True))) for name in chosen]
