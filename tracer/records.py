"""The kernel's records as numpy dtypes: the same layouts as probes/latrace.h, which see.

tests/probes compile that header and hold every size and offset to these.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

CELL_BYTES = 184
STACK_CELL_FRAMES = 20
STACK_KERNEL_FRAMES, STACK_USER_FRAMES = 40, 120
HIST_SLOTS = 3776
PT_REGS = 21  # words
PATTERNS = 8


class Record(IntEnum):
    """enum record_type."""

    WAIT = 1
    STACK = 2
    THREAD = 3
    SLICE = 4
    SLEEP = 5
    SAMPLE = 6
    RETRANSMIT = 7
    SOCKET = 8
    CLOSED = 9


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
CAUSES = ("throttled", "irq", "softirq", "idle", "kthread", "own", "other", "unknown")
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
        ("migrations", "<u2"),
        ("pad", "<u2"),
        ("causes", "<u8", len(CAUSES) - 1),
        ("throttled_by", "<u8"),
        ("waker_wait_ns", "<u8"),
        ("waker2_tid", "<u4"),
        ("idle_elsewhere_us", "<u4"),
    ]
)
SLICE = _in_cell(
    [
        ("type", "u1"),
        ("cause", "u1"),
        ("vector", "u1"),
        ("policy", "u1"),
        ("cpu", "<u2"),
        ("prio", "<i2"),
        ("start_ns", "<u8"),
        ("dur_ns", "<u8"),
        ("tid", "<u4"),
        ("tgid", "<u4"),
        ("victim_tid", "<u4"),
        ("pad", "<u4"),
        ("victim_run_ns", "<u8"),
        ("comm", "S16"),
        ("cgroup", "<u8"),
        ("stack_key", "<u8"),
        ("weight_ns", "<u8"),
    ]
)
SLEEP = _in_cell(
    [
        ("type", "u1"),
        ("clock", "u1"),
        ("deadline_from", "u1"),
        ("flags", "u1"),
        ("syscall", "<i2"),
        ("pad", "<u2"),
        ("tid", "<u4"),
        ("tgid", "<u4"),
        ("enter_ns", "<u8"),
        ("exit_ns", "<u8"),
        ("requested_ns", "<i8"),
        ("deadline_ns", "<u8"),
        ("slack_ns", "<u8"),
        ("overshoot_ns", "<i8"),
        ("entry_ns", "<i8"),
        ("timer_ns", "<i8"),
        ("run_queue_ns", "<i8"),
        ("return_ns", "<i8"),
        ("late_ns", "<u8"),
        ("expirations", "<u8"),
        ("ret", "<i8"),
        ("stack_key", "<u8"),
    ]
)
SAMPLE = _in_cell(
    [
        ("type", "u1"),
        ("pad0", "u1"),
        ("cpu", "<u2"),
        ("tid", "<u4"),
        ("tgid", "<u4"),
        ("pad1", "<u4"),
        ("ts_ns", "<u8"),
        ("weight_ns", "<u8"),
        ("stack_key", "<u8"),
    ]
)
SOCKET = _in_cell(
    [
        ("type", "u1"),
        ("event", "u1"),
        ("kind", "u1"),
        ("state", "u1"),
        ("family", "<u2"),
        ("sport", "<u2"),
        ("dport", ">u2"),
        ("segs", "<u2"),
        ("err", "<i4"),
        ("ts_ns", "<u8"),
        ("cookie", "<u8"),
        ("tgid", "<u4"),
        ("tid", "<u4"),
        ("netns", "<u4"),
        ("total_retrans", "<u4"),
        ("seq", "<u4"),
        ("len", "<u4"),
        ("srtt_us", "<u4"),
        ("rto_jiffies", "<u4"),
        ("cwnd", "<u4"),
        ("ssthresh", "<u4"),
        ("in_flight", "<u4"),
        ("rttvar_us", "<u4"),
        ("bytes_sent", "<u8"),
        ("bytes_retrans", "<u8"),
        ("bytes_acked", "<u8"),
        ("bytes_received", "<u8"),
        ("segs_out", "<u4"),
        ("segs_in", "<u4"),
        ("rate_delivered", "<u4"),
        ("rate_interval_us", "<u4"),
        ("mss", "<u4"),
        ("pad", "<u4"),
        ("saddr", "V16"),
        ("daddr", "V16"),
        ("comm", "S16"),
    ]
)
OWNER = np.dtype(
    [
        ("cookie", "<u8"),
        ("tgid", "<u4"),
        ("netns", "<u4"),
        ("total_retrans", "<u4"),
        ("state", "<u4"),
    ]
)
"""Not in the ring: an iterator writes it."""
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
        ("causes", "<u8", len(CAUSES)),
        ("reserved", "<u8", 2),
    ]
)
COPY = np.dtype(
    [
        ("key", "<u8"),
        ("tgid", "<u4"),
        ("bytes", "<u4"),
        ("base", "<u8"),
        ("regs", "<u8", PT_REGS),
    ]
)
"""The head of a record in the ring of stack copies; the copy follows."""
HIST = np.dtype(
    [
        ("kinds", "<u8", 4),
        ("wait_ns", "<u8"),
        ("max_ns", "<u8"),
        ("blocked", "<u8"),
        ("blocked_ns", "<u8"),
        ("causes", "<u8", len(CAUSES)),
        ("slots", "<u8", HIST_SLOTS),
    ]
)
OVERSHOOT = np.dtype(
    [
        ("count", "<u8"),
        ("early", "<u8"),
        ("overshoot_ns", "<u8"),
        ("entry_ns", "<u8"),
        ("timer_ns", "<u8"),
        ("run_queue_ns", "<u8"),
        ("return_ns", "<u8"),
        ("slots", "<u8", HIST_SLOTS),
    ]
)
CPU_STATE = np.dtype(
    [
        ("due_key", "<u8"),
        ("due_tid", "<u4"),
        ("pad0", "<u4"),
        ("next_key", "<u8"),
        ("copy_key", "<u8"),
        ("rows", "<u8"),
        ("stacks", "<u8"),
        ("slices", "<u8"),
        ("sleeps", "<u8"),
        ("samples", "<u8"),
        ("lost_waits", "<u8"),
        ("lost_stacks", "<u8"),
        ("lost_threads", "<u8"),
        ("lost_slices", "<u8"),
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
        ("unseen_ns", "<u8"),
        ("lost_sleeps", "<u8"),
        ("never_blocked", "<u8"),
        ("zero_timeout", "<u8"),
        ("lost_sockets", "<u8"),
        ("clock_ns", "<u8"),
        ("lost_copies", "<u8"),
        ("pad1", "<u8", 6),
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
        ("slice_ns", "<u8"),
        ("slice_tokens", "<i8"),
        ("follow_forks", "<u4"),
        ("comms", "<u4"),
        ("cgroups", "<u4"),
        ("self_tgid", "<u4"),
        ("all_sockets", "<u4"),
        ("copy_pages", "<u4"),
        ("comm", [("value", "<u8", 2), ("mask", "<u8", 2)], PATTERNS),
        ("cgroup", [("id", "<u8"), ("hierarchy", "<u8")], PATTERNS),
    ]
)
# The C name of each layout, for the test that compares them.
STRUCTS = {
    "wait_record": WAIT,
    "stack_record": STACK,
    "thread_record": THREAD,
    "slice_record": SLICE,
    "sleep_record": SLEEP,
    "sample_record": SAMPLE,
    "socket_record": SOCKET,
    "socket_owner": OWNER,
    "copy_head": COPY,
    "hist": HIST,
    "overshoot": OVERSHOOT,
    "cpu_state": CPU_STATE,
    "control": CONTROL,
}
