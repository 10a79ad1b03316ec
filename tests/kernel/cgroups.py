"""Cgroups with a CPU limit for the time of a test, under cgroup v1 or v2, always removed again."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PERIOD_US = 100_000
HEAVY = 262_144
"""The largest `cpu.shares`: a group of it leaves next to nothing to the rest of the host, so that a
test's numbers do not depend on what else runs there."""
_REMOVED_WITHIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Throttling:
    """A group's `cpu.stat`."""

    nr_periods: int
    nr_throttled: int
    throttled_ns: int

    def __sub__(self, other: Throttling) -> Throttling:
        return Throttling(
            self.nr_periods - other.nr_periods,
            self.nr_throttled - other.nr_throttled,
            self.throttled_ns - other.throttled_ns,
        )


@dataclass(frozen=True, slots=True)
class Group:
    """A cgroup of the hierarchy that divides CPU time."""

    path: Path
    name: str
    """As /proc/PID/cgroup has it: from the hierarchy's root, with a leading slash."""
    v2: bool

    def add(self, pid: int) -> None:
        """Move a process here with all its threads."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def weigh(self, shares: int) -> None:
        """Set its part of the CPU against its siblings'; 1024 is the kernel's default."""
        if self.v2:
            weight = min(10_000, max(1, shares * 100 // 1024))
            (self.path / "cpu.weight").write_text(str(weight))
        else:
            (self.path / "cpu.shares").write_text(str(shares))

    def limit(self, quota_us: int, period_us: int = PERIOD_US) -> None:
        """Let it and the groups below it run `quota_us` of each `period_us`."""
        if self.v2:
            (self.path / "cpu.max").write_text(f"{quota_us} {period_us}")
        else:
            (self.path / "cpu.cfs_period_us").write_text(str(period_us))
            (self.path / "cpu.cfs_quota_us").write_text(str(quota_us))

    def throttling(self) -> Throttling:
        """Read what its limit has done so far."""
        pairs = (line.split() for line in (self.path / "cpu.stat").read_text().splitlines())
        stat = {key: int(value) for key, value in pairs}
        time_ns = stat["throttled_usec"] * 1000 if self.v2 else stat["throttled_time"]
        return Throttling(stat["nr_periods"], stat["nr_throttled"], time_ns)


class Groups:
    """Makes groups below one of its own at the top of the hierarchy; `close` removes them all."""

    def __init__(self, root: Path, *, v2: bool) -> None:
        self._root, self._v2 = root, v2
        self._made: list[Group] = []
        self.top = self._make(root / f"latrace-test-{os.getpid()}")

    def make(self, name: str, *, below: Group | None = None) -> Group:
        """Make a group: below `below`, or below the test's own."""
        parent = below or self.top
        if self._v2:
            (parent.path / "cgroup.subtree_control").write_text("+cpu")
        return self._make(parent.path / name)

    def _make(self, path: Path) -> Group:
        path.mkdir()
        group = Group(path, f"/{path.relative_to(self._root)}", self._v2)
        self._made.append(group)
        group.weigh(HEAVY)
        return group

    def close(self) -> None:
        """Move who is left out, and remove the groups."""
        for group in reversed(self._made):
            deadline = time.monotonic() + _REMOVED_WITHIN_S
            while True:
                for pid in (group.path / "cgroup.procs").read_text().split():
                    with contextlib.suppress(OSError):  # it ended
                        (self._root / "cgroup.procs").write_text(pid)
                try:
                    group.path.rmdir()
                    break
                except OSError:  # those that ended are still being taken down
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)
        self._made.clear()


def _v1_root() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if kind.startswith("cgroup ") and "cpu" in kind.split()[2].split(","):
            return Path(mount.split()[4])
    return None


def _v2_root() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        root = Path(mount.split()[4])
        if kind.startswith("cgroup2 ") and "cpu" in (root / "cgroup.controllers").read_text():
            return root
    return None


@contextlib.contextmanager
def cpu_groups() -> Iterator[Groups]:
    """Groups in the hierarchy that has the `cpu` controller; in a mount of ours if there is none.

    One test run at a time has them: two would be as heavy as each other. The mount table has to be
    a private one, as that of the tests is (tests/conftest.py).
    """
    with contextlib.ExitStack() as undo:
        lock = Path(tempfile.gettempdir()) / "latrace-cpu-groups.lock"
        fcntl.flock(undo.enter_context(lock.open("w")), fcntl.LOCK_EX)
        if (root := _v1_root()) is not None:
            groups = Groups(root, v2=False)
        elif (root := _v2_root()) is not None:
            control = root / "cgroup.subtree_control"
            if "cpu" not in control.read_text().split():
                control.write_text("+cpu")
                undo.callback(control.write_text, "-cpu")
            groups = Groups(root, v2=True)
        else:
            root = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="latrace-cpu-")))
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.mount(b"none", os.fsencode(root), b"cgroup", ctypes.c_ulong(0), b"cpu"):
                raise OSError(ctypes.get_errno(), "no cgroup hierarchy with the cpu controller")
            undo.callback(libc.umount2, os.fsencode(root), 2)  # MNT_DETACH
            groups = Groups(root, v2=False)
        undo.callback(groups.close)
        yield groups
