"""The capture's tables: one Arrow schema each, the contract between recording and analysis.

Every column name carries its unit. All times are CLOCK_MONOTONIC nanoseconds. Columns may be
added within a schema version, none is renamed or retyped: a reader fills the columns that a
capture does not have with nulls.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import pyarrow as pa

SCHEMA_VERSION: Final = 1

MANIFEST: Final = "manifest.json"
SUFFIX: Final = ".arrows"

# One type for every column of names, so that tables can be joined and chunks unified freely.
NAME: Final = pa.dictionary(pa.int32(), pa.utf8())

WAITS: Final = pa.schema(
    [
        ("run_ns", pa.uint64()),  # when it ran again: the end of the wait
        ("wait_ns", pa.uint64()),
        ("tid", pa.int32()),
        ("tgid", pa.int32()),
        ("cpu", pa.int32()),  # where it ran
        ("kind", NAME),  # wakeup, new, preempted
        ("waker_tid", pa.int32()),
        ("waker", NAME),  # the waker's comm
        ("waker_tgid", pa.int32()),
        ("waker_ctx", NAME),  # task, hardirq, softirq
        ("waker_wait_ns", pa.uint64()),  # the waker's own wait before: one hop further
        ("waker2_tid", pa.int32()),
        ("blocked_ns", pa.uint64()),  # off the CPU and not runnable, before this wait
        ("syscall", NAME),  # the call it was blocked in
        ("stack", pa.int32()),  # where it left the CPU: stacks.id, -1 when not sampled
        ("weight_ns", pa.uint64()),  # the waiting time that `stack` stands for; 0: not sampled
        ("blocked_weight_ns", pa.uint64()),  # the blocked time that `stack` stands for
        ("waker_stack", pa.int32()),  # goes with blocked_weight_ns; -1: none
        ("sleep", pa.int64()),  # row in `sleeps`, -1: none
        ("throttled_by", NAME),  # cgroup
        ("throttled_ns", pa.uint64()),
        ("irq_ns", pa.uint64()),
        ("softirq_ns", pa.uint64()),
        ("idle_ns", pa.uint64()),
        ("kthread_ns", pa.uint64()),
        ("own_ns", pa.uint64()),
        ("other_ns", pa.uint64()),
        ("unknown_ns", pa.uint64()),
        ("wakeup_ns", pa.uint64()),  # waking to queued; beside the parts, not one of them
        ("migrations", pa.uint32()),
        ("idle_elsewhere_ns", pa.uint64()),
    ]
)

STACKS: Final = pa.schema(
    [
        ("id", pa.int32()),
        ("frames", pa.list_(pa.int32())),  # frames.id, leaf first: kernel frames, then user
        ("whole", pa.bool_()),  # False: the walk ended before the thread's first frame
        ("kernel_frames", pa.int32()),  # how many of the leading frames are the kernel's
    ]
)

FRAMES: Final = pa.schema(
    [
        ("id", pa.int32()),
        ("symbol", pa.utf8()),  # null: unknown
        ("module", pa.utf8()),
        ("offset", pa.uint64()),  # into the symbol, or into the module when there is no symbol
        ("space", NAME),  # kernel, user, jit
    ]
)

THREADS: Final = pa.schema(
    [
        ("tid", pa.int32()),
        ("tgid", pa.int32()),
        ("comm", NAME),
        ("start_ns", pa.uint64()),
        ("cgroup", NAME),
        ("waits", pa.uint64()),  # this and the totals below: exact, counted in the kernel
        ("wait_ns", pa.uint64()),
        ("max_wait_ns", pa.uint64()),
        ("blocked", pa.uint64()),
        ("blocked_ns", pa.uint64()),
        ("open", NAME),  # state at the end: "", waiting, blocked
        ("open_ns", pa.uint64()),  # how long it had been in that state
        ("stack", pa.int32()),  # where it stood then, when blocked; -1 unknown
        ("ppid", pa.int32()),
    ]
)

HIST: Final = pa.schema(
    [
        ("metric", NAME),  # wait, overshoot:<call>
        ("tgid", pa.int32()),
        ("lo_ns", pa.uint64()),
        ("hi_ns", pa.uint64()),  # exclusive; the last bucket's is 2**64 - 1, inclusive
        ("count", pa.uint64()),
        ("snapshot", pa.uint32()),
    ]
)

TOTALS: Final = pa.schema(
    [
        ("tgid", pa.int32()),
        ("waits", pa.uint64()),
        ("wait_ns", pa.uint64()),
        ("max_ns", pa.uint64()),
        ("blocked", pa.uint64()),
        ("blocked_ns", pa.uint64()),
        ("waits_wakeup", pa.uint64()),
        ("waits_new", pa.uint64()),
        ("waits_preempted", pa.uint64()),
        ("snapshot", pa.uint32()),
    ]
)

TABLES: Final[Mapping[str, pa.Schema]] = MappingProxyType(
    {
        "waits": WAITS,
        "stacks": STACKS,
        "frames": FRAMES,
        "threads": THREADS,
        "hist": HIST,
        "totals": TOTALS,
    }
)

SNAPSHOTS: Final = frozenset({"hist", "totals"})
"""Tables whose rows are counters read at one moment. Each reading is appended whole, under the
next `snapshot` number; a reader takes the last one only."""
