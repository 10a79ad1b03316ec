"""What tracing itself costs: the BPF programs' run time and our own CPU time.

BPF statistics double the cost of a small program, so they are on for a tenth of a second in every
five. What was measured then is scaled by the host's context switches, which drive the programs and
which the kernel counts exactly (`ctxt` in /proc/stat); the program that a clock drives, by time.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import bpf
from .compile import ON_CPU

WINDOW_S, EVERY_S, FIRST_S = 0.1, 5.0, 0.3
ENOUGH_SWITCHES, WINDOW_MAX_S = 200, 1.0
"""A quiet host's window stays open for longer: a scale made of few switches would be chance."""


@dataclass(frozen=True, slots=True)
class _Window:
    """A measuring window that is open: the descriptor that keeps it so, and how things stood."""

    statistics: int
    opened_s: float
    switches: int
    before: dict[str, bpf.ProgramStatistics]


class Cost:
    """Measures while the caller calls `step` often; `report` scales and sums up."""

    def __init__(self, programs: dict[str, int]) -> None:
        self._programs = programs
        self._window: _Window | None = None
        self._due_s = time.monotonic() + FIRST_S
        self._switches_at_start = context_switches()
        self._switches_measured = 0
        self._measured_s = 0.0
        self._runs = dict.fromkeys(programs, 0)
        self._ns = dict.fromkeys(programs, 0)
        self.windows = 0
        """How many measuring windows have been closed."""
        self.window_percent = 0.0
        """What the programs took in the last one, in percent of one CPU."""
        self._cpu_at_start_s = _cpu_s()
        self._started_s = time.monotonic()
        self._closed_s = float("inf")

    def step(self) -> None:
        """Open or close a measuring window when its time has come."""
        now = time.monotonic()
        if now < self._due_s:
            return
        if self._window is None:
            self._open_window(now)
        elif self._has_seen_enough(self._window, now):
            self._close_window()
            self._due_s = now + EVERY_S

    def _open_window(self, now: float) -> None:
        try:
            statistics = bpf.enable_statistics()
        except OSError:  # no CAP_SYS_ADMIN: our own CPU time is what remains
            self._due_s = float("inf")
            return
        # Others may have statistics on outside of our windows: only the difference is ours.
        self._window = _Window(statistics, now, context_switches(), self._counters())
        self._due_s = now + WINDOW_S

    def _close_window(self) -> None:
        window, self._window = self._window, None
        if window is None:
            return
        # One that the end of the trace cut short tells nothing: its few switches would be blown up
        # to all of them.
        if time.monotonic() - window.opened_s >= WINDOW_S:
            spent_ns = 0
            for name, after in self._counters().items():
                self._runs[name] += after.runs - window.before[name].runs
                self._ns[name] += after.run_ns - window.before[name].run_ns
                spent_ns += after.run_ns - window.before[name].run_ns
            self.windows += 1
            self.window_percent = spent_ns / 1e7 / (time.monotonic() - window.opened_s)
            self._switches_measured += context_switches() - window.switches
            self._measured_s += time.monotonic() - window.opened_s
        os.close(window.statistics)

    @staticmethod
    def _has_seen_enough(window: _Window, now: float) -> bool:
        seen = context_switches() - window.switches
        return seen >= ENOUGH_SWITCHES or now - window.opened_s >= WINDOW_MAX_S

    def _counters(self) -> dict[str, bpf.ProgramStatistics]:
        return {name: bpf.program_statistics(fd) for name, fd in self._programs.items()}

    def self_cpu_percent(self) -> float:
        """Our CPU time since the start, in percent of one CPU."""
        return (
            100 * (_cpu_s() - self._cpu_at_start_s) / max(1e-3, time.monotonic() - self._started_s)
        )

    def bpf_percent(self) -> float | None:
        """The programs' run time, in percent of one CPU; None while not yet measured."""
        if not self._switches_measured:
            return None
        total = sum(self._ns.values()) * self._switch_scale()
        return total / 1e7 / max(1e-3, time.monotonic() - self._started_s)

    def _switch_scale(self) -> float:
        """By how much what was counted within the windows is less than over the whole trace."""
        if not self._switches_measured:
            return 0.0
        total = context_switches() - self._switches_at_start
        return max(1.0, total / self._switches_measured)

    def _time_scale(self) -> float:
        """The same for what a clock drives."""
        if not self._measured_s:
            return 0.0
        passed_s = min(self._closed_s, time.monotonic()) - self._started_s
        return max(1.0, passed_s / self._measured_s)

    def close(self) -> None:
        """Stop measuring. Safe to call twice."""
        self._close_window()
        self._due_s = float("inf")
        self._closed_s = min(self._closed_s, time.monotonic())

    def report(self) -> dict[str, Any]:
        """The manifest's `overhead`, from the start until now."""
        programs = []
        by_switches, by_time = self._switch_scale(), self._time_scale()
        for name, counters in self._counters().items():
            scale = by_time if name == ON_CPU else by_switches
            programs.append(
                {
                    "name": name,
                    "runs": round(scale * self._runs[name]),
                    "ns": round(scale * self._ns[name]),
                    "recursion_misses": counters.recursion_misses,
                }
            )
        return {
            "bpf_ns": sum(program["ns"] for program in programs),
            "programs": programs,
            "self_cpu_s": round(_cpu_s() - self._cpu_at_start_s, 6),
            "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def _cpu_s() -> float:
    """CPU time of this process, its threads and its children that ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@cache
def _stat() -> int:
    """/proc/stat, open for good: opening it each time costs more than reading it."""
    return os.open("/proc/stat", os.O_RDONLY | os.O_CLOEXEC)


def context_switches() -> int:
    """How many switches the CPUs of this host have made since boot."""
    # It stands below a line for each CPU, and one for the interrupts that can be very long.
    text = b""
    while piece := os.pread(_stat(), 1 << 16, len(text)):
        text += piece
        if (at := text.find(b"\nctxt ")) >= 0 and (end := text.find(b"\n", at + 1)) >= 0:
            return int(text[at + 6 : end])
    return 0


def steal_ns() -> int:
    """How long this host's CPUs were kept from it by its hypervisor, since boot, summed."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("cpu "):
            fields = line.split()
            return int(fields[8]) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return 0
