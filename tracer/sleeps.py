"""Sleep calls on their way from the probes to the table `sleeps` and to the histograms."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from latrace.analysis import histogram

from . import bpf
from .loader import Probes
from .syscalls import syscall_name

if TYPE_CHECKING:
    import pyarrow as pa

CALLS = (
    "nanosleep",
    "clock_nanosleep",
    "select",
    "pselect6",
    "poll",
    "ppoll",
    "epoll_wait",
    "epoll_pwait",
    "epoll_pwait2",
    "futex",
    "futex_waitv",
    "read",
)
"""In the order of enum sleep_call (probes/sleep.h)."""

_CLOCKS = {0: "realtime", 1: "monotonic", 7: "boottime", 11: "tai"}
_DEADLINE_FROM = {0: "timeout", 1: "absolute", 2: "timerfd"}
_EARLY, _HAS_RET = 1, 2
_PARTS = ("entry_ns", "timer_ns", "run_queue_ns", "return_ns")
_KALLSYMS = Path("/proc/kallsyms")


def sleep_columns(sleeps: npt.NDArray[np.void], stacks: npt.NDArray[np.int32]) -> dict[str, Any]:
    """Columns of the table `sleeps`; `sleeps`: shape (n,) of dtype SLEEP."""
    from .writer import names_from_codes  # noqa: PLC0415 - heavy, and after the probes are attached

    early = (sleeps["flags"] & _EARLY) != 0
    same = ("enter_ns", "exit_ns", "tid", "tgid", "requested_ns", "deadline_ns", "slack_ns")
    return {name: sleeps[name] for name in (*same, "late_ns", "expirations")} | {
        "call": names_from_codes(sleeps["syscall"], syscall_name),
        "clock": names_from_codes(sleeps["clock"], lambda clock: _CLOCKS.get(clock, f"{clock}")),
        "deadline_from": names_from_codes(sleeps["deadline_from"], _DEADLINE_FROM.get),
        **{name: _or_null(sleeps[name], early) for name in ("overshoot_ns", *_PARTS)},
        "ret": _or_null(sleeps["ret"], (sleeps["flags"] & _HAS_RET) == 0),
        "stack": stacks,
    }


def _or_null(values: npt.NDArray[Any], null: npt.NDArray[np.bool_]) -> pa.Array:
    import pyarrow as pa  # noqa: PLC0415 - as above

    return pa.array(np.ascontiguousarray(values), mask=null)


def overshoot_buckets(
    overshoots: npt.NDArray[np.void],
) -> tuple[list[str], histogram.Counts, histogram.Counts, histogram.Counts]:
    """Metric, bounds and count of every bucket that is not empty; of all targets together.

    `overshoots`: shape (len(CALLS),) of dtype OVERSHOOT.
    """
    metrics: list[str] = []
    columns: list[tuple[histogram.Counts, ...]] = []
    # A copy: the kernel goes on counting.
    for call, counts in zip(CALLS, overshoots["slots"].copy(), strict=True):
        columns.append(histogram.buckets(counts))
        metrics += [f"overshoot:{call}"] * len(columns[-1][0])
    low, high, count = (np.concatenate(column) for column in zip(*columns, strict=True))
    return metrics, low, high, count


def sleep_totals(overshoots: npt.NDArray[np.void], counters: dict[str, int]) -> dict[str, Any]:
    """What the manifest says of sleep calls: exact, whatever the rows lost.

    `overshoots`: shape (len(CALLS),) of dtype OVERSHOOT; `counters`: those of Shared.
    """
    return {
        "zero_timeout": counters["zero_timeout"],
        "never_blocked": counters["never_blocked"],
        "lost": counters["lost_sleeps"],
        "rows": counters["sleeps"],
        "calls": {
            call: {name: int(total[name]) for name in ("count", "early", "overshoot_ns", *_PARTS)}
            for call, total in zip(CALLS, overshoots, strict=True)
            if total["count"] or total["early"]
        },
    }


def tell_timerfd(probes: Probes) -> None:
    """Tell the probes where the kernel's timerfd callback is: it tells such a timer from others.

    Where the kernel hides its addresses, a timerfd is not known as the deadline of a wait.
    """
    address = _address_of(b"timerfd_tmrproc")
    bpf.map_update(probes.maps["lat_timerfd"], struct.pack("<I", 0), struct.pack("<Q", address))


def _address_of(function: bytes) -> int:
    """The kernel's address of a function, 0 when it is not to be had.

    Reads no further than that: the whole list takes the kernel 60 ms to print.
    """
    wanted, rest = b" " + function + b"\n", b""
    try:
        with _KALLSYMS.open("rb", buffering=0) as symbols:
            while piece := symbols.read(1 << 16):
                text = rest + piece
                if (end := text.find(wanted)) >= 0:
                    line = text[text.rfind(b"\n", 0, end) + 1 : end]
                    return int(line.split(b" ", 1)[0], 16)
                rest = text[-256:]
    except OSError:
        pass
    return 0
