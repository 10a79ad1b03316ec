"""What tracing itself costs: the BPF programs' run time and our own CPU time.

BPF statistics double the cost of a small program, so they are on for a tenth of a second in every
five. What was measured then is scaled by the host's context switches, which drive the programs and
which the kernel counts exactly (`ctxt` in /proc/stat).
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any

from . import bpf

WINDOW_S, EVERY_S, FIRST_S = 0.1, 5.0, 0.3


class Cost:
    """Measures while the caller calls `step` often; `report` scales and sums up."""

    def __init__(self, programs: dict[str, int]) -> None:
        self._programs = programs
        self._statistics: int | None = None
        self._due_s = time.monotonic() + FIRST_S
        self._switches_at_start = self._switches_at_open = _context_switches()
        self._switches_measured = 0
        self._cpu_at_start_s = _cpu_s()
        self._started_s = time.monotonic()

    def step(self) -> None:
        """Open or close a measuring window when its time has come."""
        now = time.monotonic()
        if now < self._due_s:
            return
        if self._statistics is None:
            try:
                self._statistics = bpf.enable_statistics()
            except OSError:  # no CAP_SYS_ADMIN: our own CPU time is what remains
                self._due_s = float("inf")
                return
            self._switches_at_open = _context_switches()
            self._due_s = now + WINDOW_S
        else:
            self._close_window()
            self._due_s = now + EVERY_S

    def _close_window(self) -> None:
        if self._statistics is not None:
            os.close(self._statistics)
            self._statistics = None
            self._switches_measured += _context_switches() - self._switches_at_open

    def self_cpu_percent(self) -> float:
        """Our CPU time since the start, in percent of one CPU."""
        return (
            100 * (_cpu_s() - self._cpu_at_start_s) / max(1e-3, time.monotonic() - self._started_s)
        )

    def bpf_percent(self) -> float | None:
        """The programs' run time, in percent of one CPU; None while not yet measured."""
        total = self._scaled_ns(sum(self._measured(name).run_ns for name in self._programs))
        if not self._switches_measured:
            return None
        return total / 1e7 / max(1e-3, time.monotonic() - self._started_s)

    def _measured(self, name: str) -> bpf.ProgramStatistics:
        return bpf.program_statistics(self._programs[name])

    def _scaled_ns(self, measured: int) -> int:
        if not self._switches_measured:
            return 0
        total = _context_switches() - self._switches_at_start
        return round(measured * max(1.0, total / self._switches_measured))

    def close(self) -> None:
        """Stop measuring. Safe to call twice."""
        self._close_window()
        self._due_s = float("inf")

    def report(self) -> dict[str, Any]:
        """The manifest's `overhead`; call `close` first."""
        programs = []
        for name in self._programs:
            measured = self._measured(name)
            programs.append(
                {
                    "name": name,
                    "runs": self._scaled_ns(measured.runs),
                    "ns": self._scaled_ns(measured.run_ns),
                    "recursion_misses": measured.recursion_misses,
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


def _context_switches() -> int:
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("ctxt "):
            return int(line.split()[1])
    return 0
