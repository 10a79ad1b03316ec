"""The loads that are slowed down: threads that wake one another, and TCP without a loss."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path

from .children import Load
from .errors import BenchError

PIPE_CPU = 1
"""The pinned loads' CPU. Not 0, where many a machine handles its interrupts."""


def pipe(loops: int) -> Load:
    """Two threads of one process pass a byte to and fro on one CPU.

    The worst case for a scheduler tracer: two switches and one or two wake-ups for every
    operation, which does nothing else.
    """
    _require_perf()
    argv = (
        "taskset",
        "-c",
        str(PIPE_CPU),
        "perf",
        "bench",
        "sched",
        "pipe",
        "-T",
        "-l",
        str(loops),
    )
    return Load(argv, "sched-pipe", loops)


def messaging(loops: int) -> Load:
    """160 threads of one process send messages through sockets on all CPUs."""
    _require_perf()
    argv = ("perf", "bench", "sched", "messaging", "-t", "-g", "4", "-l", str(loops))
    return Load(argv, "sched-messaging", loops * 4 * 20 * 20)


def _flow(mode: str, loops: int) -> Load:
    program = Path(__file__).with_name("flow.py")
    return Load((sys.executable, "-I", str(program), mode, str(loops)), "python3", loops)


stream = partial(_flow, "stream")
"""One thread sends 64 KiB at a time through the loopback device."""

requests = partial(_flow, "requests")
"""Two processes send a byte to and fro: the worst case for what runs at each send and receive."""


def _require_perf() -> None:
    for name in ("perf", "taskset"):
        if shutil.which(name) is None:
            raise BenchError(f"{name} is not installed (Debian: linux-perf, util-linux)")
