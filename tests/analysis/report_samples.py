"""A capture with everything a report shows: causes, culprits, late sleep calls, a bad moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sample_capture import (
    FRAMES,
    MANIFEST,
    STACKS,
    START_NS,
    exact_tables,
    make_waits,
    write_capture,
)

from latrace.analysis import histogram
from latrace.analysis.causes import CAUSES
from latrace.analysis.schema import SLICES

SPAN_NS = 10_000_000_000
BAD_S = (6.0, 7.0)  # when the neighbour is at work


def make_tables(count: int, *, name: str = "batch-indexer", seed: int = 1) -> dict[str, Any]:
    """All tables of a capture; what the culprit is called, and a function of its, is `name`."""
    rng = np.random.default_rng(seed)
    waits = make_waits(count, seed=seed)
    at_s = (waits["run_ns"] - START_NS) / 1e9
    bad = (at_s > BAD_S[0]) & (at_s < BAD_S[1])
    waits["wait_ns"] = np.where(
        bad, rng.lognormal(15.2, 0.7, count), rng.lognormal(9.4, 1.3, count)
    ).astype(np.uint64)
    wait = waits["wait_ns"]
    waits["weight_ns"] = np.where(waits["stack"] >= 0, wait * np.uint64(40), 0).astype(np.uint64)
    weights = rng.dirichlet([0.1, 0.2, 0.3, 2.0, 0.4, 1.0, 2.0, 0.02], count)
    weights[bad] = rng.dirichlet([1.0, 0.05, 0.2, 0.1, 0.2, 0.5, 9.0, 0.02], int(bad.sum()))
    edges = np.floor(np.cumsum(weights, axis=1) * wait[:, None]).astype(np.uint64)
    edges[:, -1] = wait
    parts = np.diff(edges, axis=1, prepend=np.uint64(0)).astype(np.uint64)
    for number, cause in enumerate(CAUSES):
        waits[f"{cause}_ns"] = parts[:, number]
    waits["sleep"] = np.full(count, -1, np.int64)
    waits["throttled_by"] = np.where(parts[:, 0] > 0, "/system.slice/redis.service", None).tolist()
    waits["idle_elsewhere_ns"] = (wait // np.uint64(5)).astype(np.uint64)
    tables = {"waits": waits, "frames": _frames(name), "stacks": _stacks()}
    tables |= exact_tables(waits)
    for number, cause in enumerate(CAUSES):
        column = parts[:, number]
        tables["totals"][f"{cause}_ns"] = [int(column.sum())]
        tables["threads"][f"{cause}_ns"] = [
            int(column[waits["tid"] == tid].sum()) for tid in tables["threads"]["tid"]
        ]
    tables["slices"] = _slices(waits, parts, name, rng)
    tables |= _lost_segments(waits, name)
    tables["sleeps"], overshoots = _sleeps(max(10, count // 10), rng)
    for call, late in overshoots.items():
        counts = histogram.empty()
        np.add.at(counts, histogram.slot_of(late), np.uint64(1))
        low, high, many = histogram.buckets(counts)
        hist = tables["hist"]
        hist["metric"] = [*hist["metric"], *[f"overshoot:{call}"] * len(low)]
        hist["tgid"] = np.append(hist["tgid"], np.full(len(low), -1, np.int32))
        for column, values in (("lo_ns", low), ("hi_ns", high), ("count", many)):
            hist[column] = np.append(hist[column], values)
        hist["snapshot"] = np.append(hist["snapshot"], np.ones(len(low), np.uint32))
    return tables


def _lost_segments(waits: Any, name: str) -> dict[str, Any]:
    """Segments to a host that is called `name`: 20 lost while the first thread waited."""
    calls = np.array(waits["syscall"].to_pylist()) == "epoll_wait"
    chosen = np.flatnonzero(calls & (waits["tid"] == 812) & (waits["blocked_ns"] > 1000))[:20]
    woken = (waits["run_ns"] - waits["wait_ns"])[chosen]
    count = len(chosen)
    sent = {
        "ts_ns": woken - np.uint64(500),
        "kind": ["rto"] * count,
        "segs": np.ones(count, np.uint16),
        "daddr": [name] * count,
        "dport": np.full(count, 5432, np.uint16),
        "sport": np.full(count, 40000, np.uint16),
        "tgid": np.full(count, 812, np.int32),
        "tid": np.full(count, 812, np.int32),
        "cookie": np.arange(count).astype(np.uint64),
        "srtt_us": np.full(count, 100, np.uint32),
        "rto_us": np.full(count, 200_000, np.uint32),
    }
    recovered = {
        "ts_ns": woken,
        "event": ["recovered"] * count,
        "cookie": np.arange(count).astype(np.uint64),
    }
    return {"retransmits": sent, "socket_events": recovered}


def _frames(name: str) -> dict[str, Any]:
    return {
        "id": np.arange(11, dtype=np.int32),
        "symbol": [*FRAMES["symbol"], f"compress_{name}", "index_segment", "__schedule"],
        "module": [*FRAMES["module"], f"/opt/{name}", f"/opt/{name}", "kernel"],
        "offset": np.append(FRAMES["offset"], np.array([1, 2, 3], np.uint64)),
        "space": [*FRAMES["space"], "user", "user", "kernel"],
    }


def _stacks() -> dict[str, Any]:
    return {
        "id": np.arange(4, dtype=np.int32),
        "frames": [*STACKS["frames"], [10, 8, 9, 3]],
        "whole": [*STACKS["whole"], True],
        "kernel_frames": np.append(STACKS["kernel_frames"], np.int32(1)),
    }


def _slices(waits: Any, parts: Any, name: str, rng: np.random.Generator) -> dict[str, Any]:
    """One slice for each cause that has a culprit, of waits of 10 us and more."""
    slow = np.flatnonzero(waits["wait_ns"] >= 10_000)
    kinds = {
        "irq": (-1, -1, None, None, 0, None),
        "softirq": (-1, -1, None, None, 0, "NET_RX"),
        "kthread": (33, 33, "kworker/2:1", "other", 120, None),
        "own": (812, 812, "redis-server", "other", 120, None),
        "other": (998, 998, name, "fifo", 49, None),
    }
    columns: dict[str, list[Any]] = {key: [] for key in SLICES.names}
    for cause, (tid, tgid, comm, policy, prio, vector) in kinds.items():
        spent = parts[:, CAUSES.index(cause)]
        chosen = slow[spent[slow] > 0]
        sampled = rng.random(len(chosen)) < 0.2
        ours = cause == "other"
        for key, values in {
            "start_ns": (waits["run_ns"] - waits["wait_ns"])[chosen].tolist(),
            "dur_ns": spent[chosen].tolist(),
            "cpu": waits["cpu"][chosen].tolist(),
            "tid": [tid] * len(chosen),
            "tgid": [tgid] * len(chosen),
            "comm": [comm] * len(chosen),
            "cgroup": [f"/user.slice/{name}.service" if ours else None] * len(chosen),
            "policy": [policy] * len(chosen),
            "prio": [prio] * len(chosen),
            "cause": [cause] * len(chosen),
            "vector": [vector] * len(chosen),
            "stack": np.where(sampled & ours, 3, -1).tolist(),
            "weight_ns": np.where(sampled & ours, spent[chosen] * np.uint64(5), 0).tolist(),
            "victim_tid": waits["tid"][chosen].tolist(),
            "victim_run_ns": waits["run_ns"][chosen].tolist(),
        }.items():
            columns[key] += values
    order = np.argsort(columns["victim_run_ns"], kind="stable")
    unsigned = ("start_ns", "dur_ns", "weight_ns", "victim_run_ns")
    signed = ("cpu", "tid", "tgid", "prio", "stack", "victim_tid")
    table: dict[str, Any] = {key: [values[at] for at in order] for key, values in columns.items()}
    table |= {key: np.array(table[key], np.uint64) for key in unsigned}
    return table | {key: np.array(table[key], np.int32) for key in signed}


def _sleeps(count: int, rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    calls = np.array(["epoll_wait", "clock_nanosleep", "futex"])[
        rng.choice(3, count, p=[0.6, 0.3, 0.1])
    ]
    asked = rng.choice([50_000, 1_000_000, 10_000_000, 100_000_000], count).astype(np.int64)
    early = rng.random(count) < 0.3
    parts = np.stack(
        [
            rng.lognormal(7, 0.4, count),
            rng.lognormal(10.8, 0.3, count),
            rng.lognormal(9.5, 2.0, count),
            rng.lognormal(8, 0.5, count),
        ],
        axis=-1,
    ).astype(np.int64)
    overshoot = parts.sum(axis=1)
    enter = np.sort(rng.integers(START_NS, START_NS + SPAN_NS, count))

    def unless_early(values: Any) -> list[int | None]:
        return [None if gone else int(value) for value, gone in zip(values, early, strict=True)]

    table = {
        "enter_ns": enter.astype(np.uint64),
        "exit_ns": (enter + np.where(early, asked // 2, asked + overshoot)).astype(np.uint64),
        "tid": np.full(count, 812, np.int32),
        "tgid": np.full(count, 812, np.int32),
        "call": calls.tolist(),
        "clock": ["monotonic"] * count,
        "deadline_from": ["timeout"] * count,
        "requested_ns": asked,
        "deadline_ns": (enter + asked).astype(np.uint64),
        "slack_ns": np.full(count, 50_000, np.uint64),
        "overshoot_ns": unless_early(overshoot),
        **{
            f"{part}_ns": unless_early(parts[:, number])
            for number, part in enumerate(("entry", "timer", "run_queue", "return"))
        },
        "stack": np.full(count, -1, np.int32),
    }
    late = {call: overshoot[(calls == call) & ~early] for call in np.unique(calls)}
    return table, {str(call): values for call, values in late.items()}


def sample_manifest(**changes: Any) -> dict[str, Any]:
    """A manifest that says what the tables leave out."""
    quality = {
        **MANIFEST["quality"],
        "kernel_run_delay_ns": 7_003_000_000,
        "traced_run_delay_ns": 7_001_000_000,
        "books_blind": {"count": 812, "ns": 3_400_000},
        "lost_stacks": 12,
    }
    limited = {
        "cgroup": "/system.slice/redis.service",
        "quota_us": 50_000,
        "period_us": 100_000,
        "nr_periods": 100,
        "nr_throttled": 31,
        "throttled_ns": 812_000_000,
    }
    return {
        **MANIFEST,
        "quality": quality,
        "steal_ns": 1_200_000,
        "without": [],
        "cgroups_limited": [limited],
        **changes,
    }


def write_sample(path: Path, *, count: int = 20_000, name: str = "batch-indexer") -> Path:
    """Write such a capture."""
    return write_capture(path, make_tables(count, name=name), manifest=sample_manifest())
