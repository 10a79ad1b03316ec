"""The probes' array maps as numpy arrays over memory shared with the kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .compile import pid_max, possible_cpus
from .loader import Probes
from .records import CONTROL, CPU_STATE, HIST, OVERSHOOT
from .sleeps import CALLS

TARGET_PROCESS, TARGET_THREAD = 1, 2

_COUNTERS = tuple(
    name
    for name in (CPU_STATE.names or ())
    if name not in {"due_key", "due_tid", "pad0", "next_key", "copy_key", "pad1"}
)


class Shared:
    """Live views of the maps; numbers in them change while one looks."""

    def __init__(self, probes: Probes) -> None:
        cpus, histograms = possible_cpus(), probes.build.histograms

        def view(name: str, dtype: Any, *shape: int) -> npt.NDArray[Any]:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            memory = probes.map_memory(name, size)
            return np.frombuffer(memory, dtype, int(np.prod(shape))).reshape(shape)

        self.control = view("lat_control", CONTROL, 1)
        """Shape (1,) of CONTROL: writable, read by the probes at each event."""
        self.targets = view("lat_targets", "u1", pid_max())
        """By id: TARGET_PROCESS for a thread group, TARGET_THREAD for one thread."""
        self.cpus = view("lat_cpus", CPU_STATE, cpus)
        self.hist = view("lat_hist", HIST, histograms, cpus)
        """Shape (histograms, cpus): see `slots` of the loader for whose a histogram is."""
        self.overshoots = view("lat_overshoot", OVERSHOOT, len(CALLS))
        """By sleep call."""

    def counters(self) -> dict[str, int]:
        """The per-CPU counters, summed."""
        return {name: int(self.cpus[name].sum()) for name in _COUNTERS}

    def waits(self) -> int:
        """How many waits the targets have had."""
        return int(self.hist["kinds"].sum())

    def slot_counts(self) -> npt.NDArray[np.uint64]:
        """The wait histogram over all targets and CPUs, shape (HIST_SLOTS,)."""
        used = self.hist[self.used()]
        total: npt.NDArray[np.uint64] = used["slots"].sum(axis=(0, 1))
        return total

    def used(self) -> npt.NDArray[np.intp]:
        """The numbers of the histograms that have counted something."""
        return np.flatnonzero(self.hist["kinds"].any(axis=(1, 2)))
