"""Bundles with a spike of known time, cause and culprit, as a watch would write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sample_capture import CULPRIT_FRAMES, CULPRIT_STACKS, MANIFEST, START_NS, write_capture

from latrace.analysis import histogram
from latrace.analysis.causes import CAUSES
from latrace.analysis.schema import TABLES

S, MS, US = 10**9, 10**6, 10**3
SPAN_NS = 15 * S
FIRED_REALTIME_NS = 1_795_260_725 * S
TGID = 812


class Rows:
    """The rows of a capture, made one after the other; times are ns after its start."""

    def __init__(self) -> None:
        self.waits: list[dict[str, Any]] = []
        self.slices: list[dict[str, Any]] = []
        self.sleeps: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.tables: dict[str, dict[str, Any]] = {}

    def wait(self, end: int, wait: int, cause: str = "idle", **more: Any) -> None:
        """Add a wait, all of one cause."""
        row = {
            "run_ns": START_NS + end,
            "wait_ns": wait,
            "tid": TGID,
            "tgid": TGID,
            "kind": "wakeup",
            "stack": -1,
            "sleep": -1,
            **{f"{one}_ns": wait if one == cause else 0 for one in CAUSES},
        }
        self.waits.append(row | more)

    def culprit(self, **more: Any) -> None:
        """Say who had the CPU in the last wait: all of it."""
        victim = self.waits[-1]
        row = {
            "start_ns": victim["run_ns"] - victim["wait_ns"],
            "dur_ns": victim["wait_ns"],
            "tid": 998,
            "tgid": 998,
            "comm": "batch-indexer",
            "policy": "other",
            "prio": 120,
            "cause": "other",
            "stack": 20,
            "weight_ns": victim["wait_ns"],
            "victim_tid": victim["tid"],
            "victim_run_ns": victim["run_ns"],
        }
        self.slices.append(row | more)

    def steady(self, begin: int, end: int, *, every: int = MS, wait: int = 20 * US) -> None:
        """Add short waits, one at a time, in a stretch."""
        for at in range(begin, end, every):
            self.wait(at + wait, wait, blocked_ns=every // 2, syscall="epoll_wait")

    def sleep(self, deadline: int, overshoot: int, *, call: str = "clock_nanosleep") -> None:
        """Add a sleep call of 1 ms that came back late, because of a wait."""
        self.sleeps.append(
            {
                "enter_ns": START_NS + deadline - MS,
                "exit_ns": START_NS + deadline + overshoot,
                "tid": TGID,
                "tgid": TGID,
                "call": call,
                "requested_ns": MS,
                "deadline_ns": START_NS + deadline,
                "overshoot_ns": overshoot,
                "entry_ns": 0,
                "timer_ns": min(50 * US, overshoot),
                "run_queue_ns": max(0, overshoot - 50 * US),
                "return_ns": 0,
                "stack": -1,
            }
        )

    def capture(self) -> dict[str, dict[str, Any]]:
        """Give all tables, with the exact counters that go with the waits."""
        tables = {
            name: _columns(name, rows)
            for name, rows in (
                ("waits", sorted(self.waits, key=lambda row: row["run_ns"])),
                ("slices", self.slices),
                ("sleeps", self.sleeps),
                ("samples", self.samples),
            )
            if rows
        }
        tables["frames"] = dict(CULPRIT_FRAMES)
        tables["stacks"] = dict(CULPRIT_STACKS)
        return tables | _counted(self.waits) | self.tables


def _counted(waits: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    counts = histogram.empty()
    took = np.array([row["wait_ns"] for row in waits], np.uint64)
    np.add.at(counts, histogram.slot_of(took), np.uint64(1))
    low, high, count = histogram.buckets(counts)
    many = len(low)
    hist = {
        "metric": ["wait"] * many,
        "tgid": np.full(many, TGID, np.int32),
        "lo_ns": low,
        "hi_ns": high,
        "count": count,
        "snapshot": np.zeros(many, np.uint32),
    }
    totals: dict[str, Any] = {
        "tgid": [TGID],
        "waits": [len(waits)],
        "wait_ns": [int(took.sum())],
        "max_ns": [int(took.max(initial=0))],
        "waits_wakeup": [len(waits)],
        "snapshot": [0],
        **{f"{one}_ns": [sum(row[f"{one}_ns"] for row in waits)] for one in CAUSES},
    }
    threads = {"tid": [TGID], "tgid": [TGID], "comm": ["payments-api"], "start_ns": [5]}
    return {"hist": hist, "totals": totals, "threads": threads} if waits else {}


def _columns(table: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    schema = TABLES[table]
    found: dict[str, Any] = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        kind = schema.field(name).type
        values = [row.get(name) for row in rows]
        if str(kind).startswith(("int", "uint")) and None not in values:
            found[name] = np.array(values, kind.to_pandas_dtype())
        elif str(kind).startswith(("int", "uint")) and name not in ("overshoot_ns",):
            found[name] = np.array([value or 0 for value in values], kind.to_pandas_dtype())
        else:
            found[name] = values
    return found


def trigger(**more: Any) -> dict[str, Any]:
    """An entry of `triggers`: a P99 over 10 ms, looked at from 3 s to 8.2 s."""
    return {
        "rule": "--p99 10ms",
        "kind": "wait",
        "value": 11 * MS,
        "threshold": 10 * MS,
        "unit": "ns",
        "count": 812,
        "baseline": None,
        "since_ns": START_NS + 3 * S,
        "until_ns": START_NS + 8 * S + 200 * MS,
        "reason": "",
    } | more


def document(*triggers: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What spike.json says."""
    return {
        "schema": 1,
        "name": "spike-20261121-113205",
        "complete": True,
        "fired_ns": START_NS + 8 * S + 200 * MS,
        "fired_realtime_ns": FIRED_REALTIME_NS,
        "start_ns": START_NS,
        "end_ns": START_NS + SPAN_NS,
        "triggers": list(triggers) or [trigger()],
        "settings": {"before_s": 10.0, "after_s": 5.0, "window_s": 5.0, "cooldown_s": 60.0},
        "host": None,
        "profiles": None,
        "notes": [],
        "analysis": None,
    } | more


def write_bundle(
    path: Path, rows: Rows, spike: Mapping[str, Any] | None = None, **manifest: Any
) -> Path:
    """Write a bundle."""
    told = {**MANIFEST, "end_ns": START_NS + SPAN_NS} | manifest
    told["targets"] = [{"tgid": TGID, "comm": "payments-api"}]
    write_capture(path, rows.capture(), manifest=told)
    (path / "spike.json").write_text(json.dumps(document() if spike is None else spike))
    return path


def hog(rows: Rows, begin: int, end: int, *, wait: int = 12 * MS) -> None:
    """Add a stretch in which a neighbour has the CPU: waits one after the other."""
    for at in range(begin + wait, end + 1, wait):
        rows.wait(at, wait, "other")
        rows.culprit()


def neighbour() -> Rows:
    """A neighbour that takes the CPU for 300 ms, at 8 s."""
    rows = Rows()
    rows.steady(0, 8 * S)
    hog(rows, 8 * S, 8 * S + 300 * MS)
    rows.steady(8 * S + 300 * MS, SPAN_NS)
    return rows
