"""Runs a loaded BPF program at a rate, on one CPU: started by `drain`, which passes it on.

Arguments: descriptor, runs per second (0: as many as possible), seconds, CPU. Prints the runs and
the seconds that they took.
"""

from __future__ import annotations

import os
import sys
import time

from .kernel import run_program

_TICK_S, _BURST = 0.001, 10_000


def produce(program: int, per_s: int, seconds: float) -> tuple[int, float]:
    """Keep to the rate for so long; returns the runs made and the time that took.

    What a tick missed, because the host was busy, the next one makes up for.
    """
    began = time.monotonic()
    made = 0
    while (elapsed := time.monotonic() - began) < seconds:
        due = _BURST if per_s == 0 else int((elapsed + _TICK_S) * per_s) - made
        if due > 0:
            run_program(program, due)
            made += due
        if per_s:
            time.sleep(max(0.0, made / per_s - _TICK_S / 2 - (time.monotonic() - began)))
    return made, time.monotonic() - began


if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[4])})
    print(*produce(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
