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

SLICES: Final = pa.schema(
    [
        ("start_ns", pa.uint64()),
        ("dur_ns", pa.uint64()),  # on the CPU within the wait; interrupts are slices of their own
        ("cpu", pa.int32()),
        ("tid", pa.int32()),  # -1: an interrupt
        ("tgid", pa.int32()),
        ("comm", NAME),
        ("cgroup", NAME),
        ("policy", NAME),  # other, fifo, rr, batch, idle, deadline, ext
        ("prio", pa.int32()),  # the kernel's: 0-99 real-time, 100-139 others, -1 deadline
        ("cause", NAME),  # irq, softirq, kthread, own, other
        ("vector", NAME),  # of a softirq: NET_RX, TIMER, ...
        ("stack", pa.int32()),  # where it left the CPU; -1 not sampled
        ("weight_ns", pa.uint64()),  # the time of culprits that `stack` stands for
        ("victim_tid", pa.int32()),
        ("victim_run_ns", pa.uint64()),  # with victim_tid: the wait it is a part of
    ]
)

SLEEPS: Final = pa.schema(
    [
        ("enter_ns", pa.uint64()),
        ("exit_ns", pa.uint64()),  # back in user mode
        ("tid", pa.int32()),
        ("tgid", pa.int32()),
        ("call", NAME),
        ("clock", NAME),  # monotonic, realtime, boottime, tai
        ("deadline_from", NAME),  # timeout, absolute, timerfd
        ("requested_ns", pa.int64()),  # -1: for ever
        ("deadline_ns", pa.uint64()),  # CLOCK_MONOTONIC, whatever `clock` is
        ("slack_ns", pa.uint64()),
        ("overshoot_ns", pa.int64()),  # null when woken before the deadline; else the four parts
        ("entry_ns", pa.int64()),  # enter to armed
        ("timer_ns", pa.int64()),  # the timer's slack and lateness
        ("run_queue_ns", pa.int64()),
        ("return_ns", pa.int64()),
        ("late_ns", pa.uint64()),  # the deadline was so long past at entry
        ("expirations", pa.uint64()),  # of a periodic timerfd
        ("ret", pa.int64()),  # null where not observed
        ("stack", pa.int32()),  # of a wait in it; -1 on disk, latrace.open() joins them
    ]
)

RETRANSMITS: Final = pa.schema(
    [
        ("ts_ns", pa.uint64()),
        ("kind", NAME),  # rto, fast, tlp, synack, unknown
        ("segs", pa.uint16()),  # as the socket's own counter has them
        ("total_retrans", pa.uint32()),  # that counter, after it
        ("err", pa.int32()),  # of sending it; 0: none
        ("family", NAME),  # inet, inet6
        ("saddr", NAME),
        ("sport", pa.uint16()),
        ("daddr", NAME),
        ("dport", pa.uint16()),
        ("state", NAME),
        ("seq", pa.uint32()),
        ("len", pa.uint32()),  # in sequence numbers: bytes, and one for SYN or FIN
        ("tgid", pa.int32()),  # who used the socket last; not whom the interrupt came to
        ("tid", pa.int32()),  # 0: nobody was seen to use it
        ("comm", NAME),  # the owner's name then
        ("netns", pa.uint64()),
        ("cookie", pa.uint64()),
        ("srtt_us", pa.uint32()),
        ("rto_us", pa.uint32()),
        ("cwnd", pa.uint32()),
        ("ssthresh", pa.uint32()),
        ("in_flight", pa.uint32()),
    ]
)

SOCKET_EVENTS: Final = pa.schema(
    [
        ("ts_ns", pa.uint64()),
        ("event", NAME),  # recovered; received: the first time after a retransmit
        ("cookie", pa.uint64()),
        ("netns", pa.uint64()),
        ("tgid", pa.int32()),
        ("tid", pa.int32()),
    ]
)

_TCP_INFO: Final = (
    "rtt_us", "rttvar_us", "rto_us", "cwnd", "ssthresh", "total_retrans", "segs_out", "segs_in",
    "bytes_sent", "bytes_retrans", "bytes_acked", "bytes_received",
    "delivery_rate",  # bytes/s
)  # fmt: skip

CONNECTIONS: Final = pa.schema(
    [
        ("cookie", pa.uint64()),
        ("netns", pa.uint64()),
        ("family", NAME),
        ("saddr", NAME),
        ("sport", pa.uint16()),
        ("daddr", NAME),
        ("dport", pa.uint16()),
        ("tgid", pa.int32()),  # who used it last
        ("owners", pa.list_(pa.int32())),  # the processes that have it open
        ("state", NAME),
        ("congestion", NAME),  # the algorithm's name; "": not seen
        ("closed_ns", pa.uint64()),  # null: open when the trace ended
        # TCP_INFO (include/uapi/linux/tcp.h). Null at the start: the connection came later.
        *((f"start_{name}", pa.uint64()) for name in _TCP_INFO),
        *((f"end_{name}", pa.uint64()) for name in _TCP_INFO),
    ]
)

SAMPLES: Final = pa.schema(
    [
        ("ts_ns", pa.uint64()),
        ("tid", pa.int32()),
        ("tgid", pa.int32()),
        ("cpu", pa.int32()),
        ("stack", pa.int32()),  # what it was doing on the CPU; -1 missing
        ("weight_ns", pa.uint64()),  # the time on the CPU that the sample stands for
    ]
)

STACKS: Final = pa.schema(
    [
        ("id", pa.int32()),
        ("frames", pa.list_(pa.int32())),  # frames.id, leaf first: kernel frames, then user
        ("whole", pa.bool_()),  # False: the walk ended before the thread's first frame
        ("end", NAME),  # "whole", or what ended it
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
        ("path", NAME),  # of the file, as its process saw it; null: none that was read
        ("build_id", NAME),  # of that file, in hex
        ("address", pa.uint64()),  # in that file (ELF); of a return address, the byte before it
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
        ("throttled_ns", pa.uint64()),  # this and the next: its waiting time by cause, exact
        ("irq_ns", pa.uint64()),
        ("softirq_ns", pa.uint64()),
        ("idle_ns", pa.uint64()),
        ("kthread_ns", pa.uint64()),
        ("own_ns", pa.uint64()),
        ("other_ns", pa.uint64()),
        ("unknown_ns", pa.uint64()),
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
        ("throttled_ns", pa.uint64()),  # this and the next: the waiting time by cause
        ("irq_ns", pa.uint64()),
        ("softirq_ns", pa.uint64()),
        ("idle_ns", pa.uint64()),
        ("kthread_ns", pa.uint64()),
        ("own_ns", pa.uint64()),
        ("other_ns", pa.uint64()),
        ("unknown_ns", pa.uint64()),
        ("snapshot", pa.uint32()),
    ]
)

TABLES: Final[Mapping[str, pa.Schema]] = MappingProxyType(
    {
        "waits": WAITS,
        "slices": SLICES,
        "sleeps": SLEEPS,
        "samples": SAMPLES,
        "retransmits": RETRANSMITS,
        "socket_events": SOCKET_EVENTS,
        "connections": CONNECTIONS,
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
