"""Make captures with known contents, as the tracer would write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latrace.analysis import histogram
from latrace.tracer.outputs import create_output_dir
from latrace.tracer.writer import CaptureWriter, names_from_codes

START_NS = 1_000_000_000_000
KINDS = ("wakeup", "new", "preempted")

MANIFEST: dict[str, Any] = {
    "latrace": "0.1.0",
    "host": "web-7",
    "kernel": "6.1.0-18-amd64",
    "machine": "x86_64",
    "cpus": 8,
    "started_realtime_ns": 1_700_000_000_000_000_000,
    "start_ns": START_NS,
    "end_ns": START_NS + 10_000_000_000,
    "command": ["latrace", "attach", "--pid", "812"],
    "targets": [{"tgid": 812, "comm": "redis-server", "cmdline": "redis-server *:6379"}],
    "quality": {
        "lost_events": 0,
        "lost_stacks": 0,
        "open_at_start": 1,
        "open_at_end": 2,
        "degraded": [],
        "kernel_run_delay_ns": 0,
        "traced_run_delay_ns": 0,
        "books_blind": {"count": 0, "ns": 0},
    },
    "overhead": {
        "bpf_ns": 456_000_000,
        "programs": [{"name": "lt_switch", "runs": 100, "ns": 11_000}],
        "self_cpu_s": 1.234,
        "max_rss_bytes": 88_000_000,
    },
}


def make_waits(count: int, *, seed: int = 1, tgid: int = 812) -> dict[str, Any]:
    """Columns of `waits`, drawn at random but always the same."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, count, p=[0.9, 0.02, 0.08])
    preempted = kind == 2
    wait = rng.lognormal(9.4, 1.6, count).astype(np.uint64)
    blocked = np.where(preempted, 0, rng.lognormal(10.5, 1.2, count)).astype(np.uint64)
    context = np.where(preempted, -1, rng.choice(3, count, p=[0.7, 0.1, 0.2]))
    waker = np.array([b"redis-benchmark", b"swapper/3", b"bio_lazy_free", b"kworker/2:1"], "S16")
    sampled = rng.random(count) < 0.02
    return {
        "run_ns": np.sort(rng.integers(START_NS, START_NS + 10**10, count)).astype(np.uint64),
        "wait_ns": wait,
        "tid": (tgid + rng.choice(5, count, p=[0.8, 0.1, 0.05, 0.03, 0.02])).astype(np.int32),
        "tgid": np.full(count, tgid, np.int32),
        "cpu": rng.integers(0, 8, count).astype(np.int32),
        "kind": names_from_codes(kind, KINDS.__getitem__),
        "waker_tid": np.where(preempted, -1, rng.integers(900, 904, count)).astype(np.int32),
        "waker": waker[rng.choice(4, count, p=[0.7, 0.1, 0.1, 0.1])],
        "waker_tgid": np.full(count, 900, np.int32),
        "waker_ctx": names_from_codes(
            context, lambda code: None if code < 0 else ("task", "hardirq", "softirq")[code]
        ),
        "blocked_ns": blocked,
        "syscall": names_from_codes(
            np.where(preempted, -1, rng.choice(3, count, p=[0.8, 0.15, 0.05])),
            lambda code: None if code < 0 else ("epoll_wait", "futex", "")[code],
        ),
        "stack": np.where(sampled, rng.integers(0, 3, count), -1).astype(np.int32),
        "weight_ns": np.where(sampled, wait * np.uint64(40), 0).astype(np.uint64),
        "blocked_weight_ns": np.where(sampled, blocked * np.uint64(40), 0).astype(np.uint64),
        "waker_stack": np.full(count, -1, np.int32),
        "wakeup_ns": rng.integers(100, 3000, count).astype(np.uint64),
        "migrations": rng.integers(0, 2, count).astype(np.uint32),
    }


FRAMES = {
    "id": np.arange(8, dtype=np.int32),
    "symbol": [
        "epoll_wait",
        "aeApiPoll",
        "aeProcessEvents",
        "main",
        "do_epoll_wait",
        "std::vector<std::pair<std::string, int>>::_M_realloc_insert<std::pair<std::string, int>>",
        None,
        "writeToClient",
    ],
    "module": [
        "libc.so.6",
        *["/usr/bin/redis-server"] * 3,
        "kernel",
        *["/usr/bin/redis-server"] * 3,
    ],
    "offset": np.array([3, 5, 7, 9, 11, 13, 0x1234, 17], np.uint64),
    "space": ["user"] * 4 + ["kernel"] + ["user"] * 3,
}
STACKS = {
    "id": np.arange(3, dtype=np.int32),
    "frames": [[4, 0, 1, 2, 3], [5, 6, 7, 3], [4]],
    "whole": [True, False, True],
    "kernel_frames": np.array([1, 0, 1], np.int32),
}


def exact_tables(waits: Mapping[str, Any], *, snapshot: int = 1) -> dict[str, dict[str, Any]]:
    """The exact tables (`hist`, `totals`, `threads`) that go with all these waits."""
    wait, tid = waits["wait_ns"], waits["tid"]
    counts = histogram.empty()
    np.add.at(counts, histogram.slot_of(wait), np.uint64(1))
    low, high, count = histogram.buckets(counts)
    kinds = waits["kind"].to_pylist()
    tgid = waits["tgid"][:1]
    tids = np.unique(tid)
    return {
        "hist": {
            "metric": ["wait"] * len(low),
            "tgid": np.full(len(low), tgid[0], np.int32),
            "lo_ns": low,
            "hi_ns": high,
            "count": count,
            "snapshot": np.full(len(low), snapshot, np.uint32),
        },
        "totals": {
            "tgid": tgid,
            "waits": [len(wait)],
            "wait_ns": [int(wait.sum())],
            "max_ns": [int(wait.max())],
            "blocked": [int((waits["blocked_ns"] > 0).sum())],
            "blocked_ns": [int(waits["blocked_ns"].sum())],
            **{f"waits_{kind}": [kinds.count(kind)] for kind in KINDS},
            "snapshot": [snapshot],
        },
        "threads": {
            "tid": tids.astype(np.int32),
            "tgid": np.full(len(tids), tgid[0], np.int32),
            "comm": ["redis-server", "bio_close_file", "bio_aof", "bio_lazy_free", "io_thd_1"][
                : len(tids)
            ],
            "start_ns": np.full(len(tids), 5, np.uint64),
            "cgroup": ["/system.slice/redis.service"] * len(tids),
            "waits": [int((tid == one).sum()) for one in tids],
            "wait_ns": [int(wait[tid == one].sum()) for one in tids],
            "max_wait_ns": [int(wait[tid == one].max()) for one in tids],
            "blocked": [int((waits["blocked_ns"][tid == one] > 0).sum()) for one in tids],
            "blocked_ns": [int(waits["blocked_ns"][tid == one].sum()) for one in tids],
            "open": ["blocked"] * len(tids),
            "open_ns": np.full(len(tids), 1000, np.uint64),
            "ppid": np.full(len(tids), 1, np.int32),
        },
    }


CAUSES = ("throttled", "irq", "softirq", "idle", "kthread", "own", "other", "unknown")
FAST, SLOW = 1980, 20
FAST_PARTS = {"softirq": 4_000, "idle": 15_000, "unknown": 1_000}
SLOW_PARTS = {
    "throttled": 200_000,
    "irq": 30_000,
    "softirq": 200_000,
    "idle": 0,
    "kthread": 60_000,
    "own": 500_000,
    "unknown": 10_000,
}
SLOW_OTHER = [3_000_000 + 100_000 * number for number in range(SLOW)]
"""What other processes took of each slow wait."""
CULPRIT_FRAMES = {
    "id": np.arange(20, 26, dtype=np.int32),
    "symbol": ["__schedule", "schedule", "compress_block", "run", "main", "flush_work"],
    "module": ["kernel", "kernel", *["/usr/bin/batch-indexer"] * 3, "kernel"],
    "offset": np.zeros(6, np.uint64),
    "space": ["kernel", "kernel", "user", "user", "user", "kernel"],
}
CULPRIT_STACKS = {
    "id": np.array([20, 21, 22], np.int32),
    "frames": [[20, 21, 22, 23, 24], [20, 21, 23, 24], [20, 21, 25]],
    "whole": [True, True, True],
    "kernel_frames": np.array([2, 2, 3], np.int32),
}


def story() -> dict[str, dict[str, Any]]:
    """Tables of a capture whose slow waits are explained by round numbers.

    1980 waits of 20 us and 20 of 4 ms and more, of two threads in turn. Of the slow ones, two
    thirds of `other` went to thread 998 of batch-indexer and one third to its thread 999; the
    rest to the threads, interrupts and the quota that `SLOW_PARTS` says. Every slow wait is in a
    sleep call of its own.
    """
    count = FAST + SLOW
    slow = np.zeros(count, np.bool_)
    slow[99::100] = True
    parts = {cause: np.full(count, FAST_PARTS.get(cause, 0), np.uint64) for cause in CAUSES}
    for cause in CAUSES[:6] + CAUSES[7:]:
        parts[cause][slow] = SLOW_PARTS[cause]
    parts["other"][slow] = SLOW_OTHER
    wait = sum(parts.values())
    run = START_NS + 5_000_000 * np.arange(1, count + 1, dtype=np.uint64)
    tid = np.where(np.arange(count) // 100 % 2, 813, 812).astype(np.int32)
    waits = {
        "run_ns": run,
        "wait_ns": wait,
        "tid": tid,
        "tgid": np.full(count, 812, np.int32),
        "cpu": np.zeros(count, np.int32),
        "kind": names_from_codes(np.zeros(count, np.intp), KINDS.__getitem__),
        "waker_tid": np.full(count, 70, np.int32),
        "waker_tgid": np.full(count, 70, np.int32),
        "waker": ["feeder"] * count,
        "waker_ctx": ["task"] * count,
        "waker_wait_ns": np.where(slow, 1_000_000, 0).astype(np.uint64),
        "waker2_tid": np.where(slow, 71, 0).astype(np.int32),
        "blocked_ns": np.full(count, 1_000, np.uint64),
        "syscall": ["epoll_wait"] * count,
        "stack": np.full(count, -1, np.int32),
        "sleep": np.where(slow, np.cumsum(slow) - 1 + 100, -1).astype(np.int64),
        "throttled_by": [("/app" if one else None) for one in slow],
        "wakeup_ns": np.full(count, 500, np.uint64),
        "migrations": slow.astype(np.uint32),
        "idle_elsewhere_ns": np.where(slow, wait // np.uint64(2), 0).astype(np.uint64),
        **{f"{cause}_ns": column for cause, column in parts.items()},
    }
    exact = exact_tables(waits)
    for cause, column in parts.items():
        exact["totals"][f"{cause}_ns"] = [int(column.sum())]
        exact["threads"][f"{cause}_ns"] = [int(column[tid == one].sum()) for one in (812, 813)]
    sleeps = story_sleeps(run[slow], wait[slow], tid[slow])
    hist = exact["hist"]
    counts = histogram.empty()
    np.add.at(
        counts,
        histogram.slot_of([o for o in sleeps["overshoot_ns"] if o is not None]),
        np.uint64(1),
    )
    low, high, number = histogram.buckets(counts)
    hist["metric"] = [*hist["metric"], *["overshoot:epoll_wait"] * len(low)]
    hist["tgid"] = [*hist["tgid"], *[-1] * len(low)]
    for name, column in (("lo_ns", low), ("hi_ns", high), ("count", number)):
        hist[name] = np.concatenate([hist[name], column])
    hist["snapshot"] = np.ones(len(hist["count"]), np.uint32)
    return {
        "waits": waits,
        "slices": story_slices(run[slow], tid[slow]),
        "sleeps": sleeps,
        "stacks": _appended(STACKS, CULPRIT_STACKS),
        "frames": _appended(FRAMES, CULPRIT_FRAMES),
        **exact,
    }


def story_slices(run: Any, tid: Any) -> dict[str, Any]:
    """What had the CPU in the slow waits of `story`, and one slice of a wait that has no row."""
    lines: list[tuple[Any, ...]] = []
    for index, other in enumerate(SLOW_OTHER):
        key = (tid[index], run[index])
        third = other // 3
        lines += [
            ("other", 998, 998, "batch-indexer", "batch", 120, "", other - third, 20, 900, *key),
            ("other", 999, 998, "indexer-2", "fifo", 49, "", third, 21, 100, *key),
            ("own", 815, 812, "bio_lazy_free", "other", 120, "", 500_000, -1, 0, *key),
            ("kthread", 77, 77, "kworker/3:1H", "other", 100, "", 60_000, 22, 60_000, *key),
            ("softirq", -1, 0, None, None, 0, "NET_RX", 150_000, -1, 0, *key),
            ("softirq", -1, 0, None, None, 0, "TIMER", 50_000, -1, 0, *key),
            ("irq", -1, 0, None, None, 0, None, 30_000, -1, 0, *key),
        ]
    lost = (int(tid[0]) + 1, run[0])  # the same instant, another thread
    lines.append(("other", 666, 666, "nobody", "other", 120, "", 1_000, -1, 0, *lost))
    columns = dict(
        zip(
            (
                "cause",
                "tid",
                "tgid",
                "comm",
                "policy",
                "prio",
                "vector",
                "dur_ns",
                "stack",
                "weight_ns",
                "victim_tid",
                "victim_run_ns",
            ),
            map(list, zip(*lines, strict=True)),
            strict=True,
        )
    )
    columns["start_ns"] = np.array(columns["victim_run_ns"], np.uint64)
    columns["cgroup"] = ["/batch" if comm else None for comm in columns["comm"]]
    for name in ("dur_ns", "weight_ns", "victim_run_ns"):
        columns[name] = np.array(columns[name], np.uint64)
    return columns


def story_sleeps(run: Any, wait: Any, tid: Any) -> dict[str, Any]:
    """100 calls that were a little late, 20 late by the slow waits of `story`, 5 woken early."""
    overshoot = [60_000] * 100 + [int(one) + 60_000 for one in wait] + [None] * 5
    count = len(overshoot)

    def part(ns: int) -> list[int | None]:
        return [None if one is None else ns for one in overshoot]

    return {
        "enter_ns": np.full(count, START_NS, np.uint64),
        "exit_ns": np.concatenate([np.full(100, START_NS + 1), run, np.full(5, START_NS + 2)]),
        "tid": np.concatenate([np.full(100, 812), tid, np.full(5, 812)]).astype(np.int32),
        "tgid": np.full(count, 812, np.int32),
        "deadline_ns": np.array(
            [0] * 100 + [int(one) - 1_000_000 for one in run] + [0] * 5, np.uint64
        ),
        "call": ["epoll_wait"] * count,
        "clock": ["monotonic"] * count,
        "deadline_from": ["timeout"] * 120 + ["timerfd"] * 5,
        "requested_ns": np.array([10_000_000] * 120 + [-1] * 5, np.int64),
        "overshoot_ns": overshoot,
        "entry_ns": part(1_000),
        "timer_ns": part(50_000),
        "run_queue_ns": [None if o is None else o - 60_000 for o in overshoot],
        "return_ns": part(9_000),
        "stack": np.full(count, -1, np.int32),
    }


def _appended(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    return {name: [*first[name], *second[name]] for name in first}


def write_capture(
    path: Path,
    tables: Mapping[str, Any],
    *,
    manifest: Mapping[str, Any] = MANIFEST,
    complete: bool = True,
) -> Path:
    """Write a capture of these tables (columns by name)."""
    writer = CaptureWriter(create_output_dir(path, force=False), manifest)
    for name, columns in tables.items():
        writer.append(name, columns)
    writer.close(complete=complete)
    return path
