"""On-CPU samples: a clock on every CPU that runs the probe `lat_on_cpu` at each tick.

The clocks are perf events (perf_event_open(2)): file descriptors that end with this process.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
import time
from pathlib import Path

from .compile import ON_CPU
from .loader import Probes
from .options import Options
from .shared import Shared

_NR_PERF_EVENT_OPEN = {
    "x86_64": 298,
    "aarch64": 241,
    "riscv64": 241,
    "s390x": 331,
    "ppc64le": 319,
}
# include/uapi/linux/perf_event.h
_TYPE_SOFTWARE, _CPU_CLOCK, _ATTR_SIZE = 1, 0, 64
_DISABLED, _EXCLUDE_IDLE = 1 << 0, 1 << 7
_IOC_ENABLE, _IOC_SET_BPF = 0x2400, 0x40042408
_FLAG_FD_CLOEXEC = 8

STEP_S = 1.0
_SHARE_OF_BUDGET = 2  # samples are stacks too: half of the budget is theirs at most
_MAX_LEVEL = 10
_ONLINE = Path("/sys/devices/system/cpu/online")

_libc = ctypes.CDLL(None, use_errno=True)


class Sampler:
    """Samples from `start` to `close`; `step` is called often and keeps it within the budget.

    Where the host refuses, nothing is sampled and `refused` tells why: waits are traced all the
    same.
    """

    def __init__(self, probes: Probes, shared: Shared, options: Options) -> None:
        self._program = probes.programs.get(ON_CPU, -1)
        self._shared = shared
        self._hz = options.cpu_samples_hz if options.stacks else 0
        self._limit_per_s = options.stack_budget_per_s / _SHARE_OF_BUDGET
        self._clocks: list[int] = []
        self._level = 0
        self._due_s = 0.0
        self._seen = 0
        self.share = 1.0
        """Of the samples that there may be; whoever watches the cost lowers it."""
        self.refused = ""
        self.lowest_hz = 0.0
        """The coarsest it has been; 0: it never sampled."""

    def start(self) -> None:
        """Start the clocks."""
        if not self._hz:
            return
        if self._program < 0:
            self.refused = "the kernel refused the program"
            return
        self._set_level(0)
        self._due_s = time.monotonic() + STEP_S

    def step(self) -> None:
        """Halve the frequency when there are too many samples, double it when there are few.

        A sample carries the period that it was taken with, so widths stay unbiased.
        """
        now = time.monotonic()
        if not self._clocks or now < self._due_s:
            return
        samples = int(self._shared.cpus["samples"].sum())
        rate = (samples - self._seen) / (now - self._due_s + STEP_S)
        self._seen, self._due_s = samples, now + STEP_S
        limit_per_s = self.share * self._limit_per_s
        if rate > limit_per_s and self._level < _MAX_LEVEL:
            self._set_level(self._level + 1)
        elif self._level and rate < limit_per_s / 4:
            self._set_level(self._level - 1)

    def _set_level(self, level: int) -> None:
        self.close()
        self._level = level
        hz = self._hz / (1 << level)
        self.lowest_hz = min(hz, self.lowest_hz or hz)
        try:
            for cpu in _cpus(_ONLINE.read_text()):
                self._add_clock(cpu, round(1e9 / hz))
        except OSError as error:
            self.close()
            self.refused = error.strerror or str(error)

    def _add_clock(self, cpu: int, period_ns: int) -> None:
        try:
            clock = _open_clock(cpu, period_ns)
        except OSError as error:
            if error.errno == errno.ENODEV:  # taken offline a moment ago
                return
            raise
        self._clocks.append(clock)
        fcntl.ioctl(clock, _IOC_SET_BPF, self._program)
        fcntl.ioctl(clock, _IOC_ENABLE, 0)

    def close(self) -> None:
        """Stop the clocks. Safe to call twice."""
        while self._clocks:
            os.close(self._clocks.pop())


def _open_clock(cpu: int, period_ns: int) -> int:
    """A stopped clock of one CPU, for all that runs there but the idle task. Raises OSError."""
    attributes = struct.pack(
        "<IIQQQQQIIQ",
        _TYPE_SOFTWARE,
        _ATTR_SIZE,
        _CPU_CLOCK,
        period_ns,
        0,
        0,
        _DISABLED | _EXCLUDE_IDLE,
        0,
        0,
        0,
    )
    number = _NR_PERF_EVENT_OPEN[platform.machine()]
    clock: int = _libc.syscall(number, attributes, -1, cpu, -1, _FLAG_FD_CLOEXEC)
    if clock < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return clock


def _cpus(ranges: str) -> list[int]:
    """The numbers in a list as /sys writes it: `0-3,8`."""
    cpus: list[int] = []
    for part in ranges.strip().split(","):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus
