"""Which processes are targets right now: asked once more after the probes are attached.

Between the moment the command line was resolved and the moment the kernel follows forks, execs and
cgroup moves by itself, processes may have come.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .options import Options
from .processes import descendants, processes
from .records import PATTERNS
from .targets import cgroup_members, comm_matches


def members(options: Options) -> set[int]:
    """Process ids of all targets alive now (those of single threads not included)."""
    found = set(options.pids)
    if options.comms:
        found |= {
            task.tgid
            for task in processes()
            if not task.is_kernel and any(comm_matches(task.comm, comm) for comm in options.comms)
        }
    found |= {task.tgid for task in cgroup_members(options.cgroups)}
    if options.children:
        found |= {task.tgid for task in descendants(found)}
    found.discard(os.getpid())
    return found


def write_rules(control: npt.NDArray[np.void], options: Options) -> None:
    """Tell the kernel side which processes to add by itself, never this one.

    `control`: an array of one CONTROL, changed.

    Forks are followed for `children`, and in a cgroup, which a child is born into.
    """
    control["self_tgid"] = os.getpid()
    control["follow_forks"] = options.children or bool(options.cgroups)
    for index, comm in enumerate(options.comms[:PATTERNS]):
        # An exact name is compared up to and including its NUL, a prefix without one.
        raw = comm.removesuffix("*").encode("utf-8", "surrogateescape")[:15]
        length = len(raw) + (not comm.endswith("*"))
        rule = control["comm"][0][index]
        rule["value"] = np.frombuffer(raw.ljust(16, b"\0"), "<u8")
        rule["mask"] = np.frombuffer((b"\xff" * length).ljust(16, b"\0"), "<u8")
    control["comms"] = min(len(options.comms), PATTERNS)
    for index, cgroup in enumerate(options.cgroups[:PATTERNS]):
        control["cgroup"][0][index] = (cgroup.stat().st_ino, _hierarchy(cgroup))
    control["cgroups"] = min(len(options.cgroups), PATTERNS)


def _hierarchy(cgroup: Path) -> int:
    """The kernel's number of the hierarchy that a cgroup directory is in; 0 for v2."""
    if (cgroup / "cgroup.controllers").exists():
        return 0
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, _ = line.split(":", 2)
        if "cpu" in controllers.split(","):
            return int(number)
    return 0
