"""The kernel's records as numpy dtypes: the same layouts as probes/latrace.h, which see.

tests/probes compile that header and hold every size and offset to these.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

CELL_BYTES = 120
STACK_CELL_FRAMES = 12
STACK_KERNEL_FRAMES, STACK_USER_FRAMES = 48, 120
HIST_SLOTS = 3776
PATTERNS = 8


class Record(IntEnum):
    """enum record_type."""

    WAIT = 1
    STACK = 2
    THREAD = 3


class Place(IntEnum):
    """enum wait_place: where a thread is."""

    UNKNOWN = 0
    ON_CPU = 1
    BLOCKED = 2
    WAITING = 3


class ThreadEvent(IntEnum):
    """enum thread_event."""

    SEEN = 0
    FORK = 1
    EXEC = 2
    RENAME = 3
    EXIT = 4
    END = 5


# By number, as the records have them.
WAIT_KINDS = ("wakeup", "new", "preempted")
WAKER_CONTEXTS = ("task", "softirq", "hardirq", "unknown")


def _in_cell(fields: list[tuple[Any, ...]]) -> np.dtype[np.void]:
    """A packed record, with the rest of its cell as padding."""
    places = dict(np.dtype(fields).fields or {})
    return np.dtype(
        {
            "names": list(places),
            "formats": [kind for kind, *_ in places.values()],
            "offsets": [offset for _, offset, *_ in places.values()],
            "itemsize": CELL_BYTES,
        }
    )


WAIT = _in_cell(
    [
        ("type", "u1"),
        ("kind", "u1"),
        ("waker_ctx", "u1"),
        ("place", "u1"),
        ("cpu", "<u2"),
        ("syscall", "<i2"),
        ("run_ns", "<u8"),
        ("wait_ns", "<u8"),
        ("blocked_ns", "<u8"),
        ("tid", "<u4"),
        ("tgid", "<u4"),
        ("waker_tid", "<u4"),
        ("waker_tgid", "<u4"),
        ("waker", "S16"),
        ("weight_ns", "<u8"),
        ("blocked_weight_ns", "<u8"),
        ("stack_key", "<u8"),
        ("waker_key", "<u8"),
        ("wakeup_ns", "<u4"),
        ("migrations", "<u4"),
    ]
)
STACK = _in_cell(
    [
        ("type", "u1"),
        ("part", "u1"),
        ("has_user", "u1"),
        ("pad", "u1"),
        ("kernel", "<u2"),
        ("user", "<u2"),
        ("key", "<u8"),
        ("tid", "<u4"),
        ("tgid", "<u4"),
        ("frames", "<u8", STACK_CELL_FRAMES),
    ]
)
THREAD = _in_cell(
    [
        ("type", "u1"),
        ("event", "u1"),
        ("place", "u1"),
        ("frames", "u1"),
        ("tid", "<u4"),
        ("tgid", "<u4"),
        ("ppid", "<u4"),
        ("ts_ns", "<u8"),
        ("start_ns", "<u8"),
        ("comm", "S16"),
        ("open_ns", "<u8"),
        ("waits", "<u8"),
        ("wait_ns", "<u8"),
        ("max_wait_ns", "<u8"),
        ("blocked", "<u8"),
        ("blocked_ns", "<u8"),
        ("user_ip", "<u8"),
        ("user_fp", "<u8"),
        ("reserved", "<u8"),
    ]
)
HIST = np.dtype(
    [
        ("kinds", "<u8", 4),
        ("wait_ns", "<u8"),
        ("max_ns", "<u8"),
        ("blocked", "<u8"),
        ("blocked_ns", "<u8"),
        ("slots", "<u8", HIST_SLOTS),
    ]
)
CPU_STATE = np.dtype(
    [
        ("due_key", "<u8"),
        ("due_tid", "<u4"),
        ("pad0", "<u4"),
        ("next_key", "<u8"),
        ("rows", "<u8"),
        ("stacks", "<u8"),
        ("lost_waits", "<u8"),
        ("lost_stacks", "<u8"),
        ("lost_threads", "<u8"),
        ("missed_stacks", "<u8"),
        ("discarded", "<u8"),
        ("no_start", "<u8"),
        ("missed_switches", "<u8"),
        ("recovered", "<u8"),
        ("no_storage", "<u8"),
        ("open_at_start", "<u8"),
        ("timed_waits", "<u8"),
        ("timed_ns", "<u8"),
        ("kernel_ns", "<u8"),
        ("kernel_count", "<u8"),
        ("blind_waits", "<u8"),
        ("blind_ns", "<u8"),
        ("unbooked", "<u8"),
        ("pad", "<u8", 7),
    ]
)
CONTROL = np.dtype(
    [
        ("min_ns", "<u8"),
        ("slow_ns", "<u8"),
        ("slow_blocked_ns", "<u8"),
        ("wait_period_ns", "<u8"),
        ("blocked_period_ns", "<u8"),
        ("tokens", "<i8"),
        ("follow_forks", "<u4"),
        ("comms", "<u4"),
        ("cgroups", "<u4"),
        ("self_tgid", "<u4"),
        ("comm", [("value", "<u8", 2), ("mask", "<u8", 2)], PATTERNS),
        ("cgroup", [("id", "<u8"), ("hierarchy", "<u8")], PATTERNS),
    ]
)
# The C name of each layout, for the test that compares them.
STRUCTS = {
    "wait_record": WAIT,
    "stack_record": STACK,
    "thread_record": THREAD,
    "hist": HIST,
    "cpu_state": CPU_STATE,
    "control": CONTROL,
}
