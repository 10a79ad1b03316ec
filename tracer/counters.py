"""What the kernel counts, as rows of the tables `hist`, `totals` and `threads`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from latrace.analysis import histogram

from .records import CAUSES, Place, ThreadEvent
from .sleeps import overshoot_buckets

_CAUSE_COLUMNS = [f"{cause}_ns" for cause in CAUSES]
_OPEN = {Place.WAITING: "waiting", Place.UNKNOWN: "waiting", Place.BLOCKED: "blocked"}


def thread_columns(
    threads: npt.NDArray[np.void], cgroups: Mapping[int, str], stacks: list[int] | None = None
) -> dict[str, Any]:
    """Columns of the table `threads`.

    `threads`: shape (n,) of dtype THREAD; `cgroups` by process; `stacks`: ids of where they stand,
    -1 unknown.
    """
    is_open = (threads["event"] == ThreadEvent.END).tolist()
    return {
        "tid": threads["tid"],
        "tgid": threads["tgid"],
        "comm": np.ascontiguousarray(threads["comm"]),
        "start_ns": threads["start_ns"],
        "cgroup": [cgroups.get(tgid, "") for tgid in threads["tgid"].tolist()],
        "waits": threads["waits"],
        "wait_ns": threads["wait_ns"],
        "max_wait_ns": threads["max_wait_ns"],
        "blocked": threads["blocked"],
        "blocked_ns": threads["blocked_ns"],
        "open": [
            _OPEN.get(place, "") if at_end else ""
            for place, at_end in zip(threads["place"].tolist(), is_open, strict=True)
        ],
        "open_ns": threads["open_ns"],
        "stack": stacks or [-1] * len(threads),
        "ppid": threads["ppid"],
        **{name: threads["causes"][:, n] for n, name in enumerate(_CAUSE_COLUMNS)},
    }


def counter_columns(
    hist: npt.NDArray[np.void],
    slots: Mapping[int, int],
    overshoots: npt.NDArray[np.void],
    *,
    snapshot: int,
) -> dict[str, dict[str, Any]]:
    """Columns of the tables `hist` and `totals`, one whole snapshot; empty: nothing was counted.

    `hist`: shape (histograms, cpus) of dtype HIST; `slots`: whose each histogram is;
    `overshoots`: shape (sleep calls,) of dtype OVERSHOOT.
    """
    buckets, totals = [], []
    for slot, tgid in slots.items():
        per_cpu = hist[slot]
        counts = per_cpu["slots"].sum(axis=0)
        waits = int(counts.sum())
        if not waits:
            continue
        lo, hi, count = histogram.buckets(counts)
        buckets.append((np.full(len(lo), tgid, np.int32), lo, hi, count))
        kinds = per_cpu["kinds"].sum(axis=0)
        totals.append(
            {
                "tgid": tgid,
                "waits": waits,
                "wait_ns": int(per_cpu["wait_ns"].sum()),
                "max_ns": int(per_cpu["max_ns"].max()),
                "blocked": int(per_cpu["blocked"].sum()),
                "blocked_ns": int(per_cpu["blocked_ns"].sum()),
                "waits_wakeup": int(kinds[0]),
                "waits_new": int(kinds[1]),
                "waits_preempted": int(kinds[2]),
                **dict(zip(_CAUSE_COLUMNS, per_cpu["causes"].sum(axis=0).tolist(), strict=True)),
                "snapshot": snapshot,
            }
        )
    if not totals:
        return {}
    metrics, lo, hi, count = overshoot_buckets(overshoots)
    buckets.append((np.full(len(metrics), -1, np.int32), lo, hi, count))
    tgids, lo, hi, count = (np.concatenate(column) for column in zip(*buckets, strict=True))
    return {
        "hist": {
            "metric": ["wait"] * (len(tgids) - len(metrics)) + metrics,
            "tgid": tgids,
            "lo_ns": lo,
            "hi_ns": hi,
            "count": count,
            "snapshot": np.full(len(tgids), snapshot, np.uint32),
        },
        "totals": {name: [row[name] for row in totals] for name in totals[0]},
    }
