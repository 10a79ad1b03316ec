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
