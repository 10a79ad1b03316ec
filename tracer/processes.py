"""What /proc says of processes and threads: identity, ancestry, PID namespaces.

Processes come and go while we read: whatever vanished is left out, never an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")

_PF_KTHREAD = 0x0020_0000  # include/linux/sched.h
_ENDED_STATES = frozenset("ZXx")
_INIT_PID_NS = "pid:[4026531836]"  # PROC_PID_INIT_INO, include/linux/proc_ns.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One thread as /proc shows it; for a process this is its leader."""

    tid: int
    tgid: int
    ppid: int
    comm: str
    """As the kernel has it; the target chooses it, so escape it before printing."""
    is_kernel: bool
    has_ended: bool
    """A zombie: it will never run again."""
    inner_ids: tuple[int, ...]
    """Its id in each PID namespace, from ours inwards."""

    @property
    def is_leader(self) -> bool:
        """Whether the id names a process rather than a further thread of one."""
        return self.tid == self.tgid


def read_task(tid: int, *, proc: Path = PROC) -> Task | None:
    """The thread (or process) `tid`; None when there is none."""
    return _read(proc / str(tid))


def processes(*, proc: Path = PROC) -> Iterator[Task]:
    """All processes, by their leaders."""
    for entry in _numbered(proc):
        task = _read(entry)
        if task is not None:
            yield task


def threads(pid: int, *, proc: Path = PROC) -> Iterator[Task]:
    """All threads of process `pid`."""
    for entry in _numbered(proc / str(pid) / "task"):
        task = _read(entry)
        if task is not None:
            yield task


def thread_count(pid: int, *, proc: Path = PROC) -> int:
    """How many threads process `pid` has now; 0 when it is gone."""
    return len(_numbered(proc / str(pid) / "task"))


def descendants(roots: set[int], *, proc: Path = PROC) -> list[Task]:
    """All live descendants of the processes `roots`, without these, in order of id."""
    children: dict[int, list[Task]] = {}
    for task in processes(proc=proc):
        children.setdefault(task.ppid, []).append(task)
    found: dict[int, Task] = {}
    todo = list(roots)
    while todo:
        for task in children.get(todo.pop(), ()):
            if task.tgid not in found and task.tgid not in roots:
                found[task.tgid] = task
                todo.append(task.tgid)
    return [found[tgid] for tgid in sorted(found) if not found[tgid].has_ended]


def in_initial_pid_namespace(*, proc: Path = PROC) -> bool:
    """Whether our ids are those the kernel's probes see (the outermost PID namespace's)."""
    try:
        return str((proc / "self/ns/pid").readlink()) == _INIT_PID_NS
    except OSError:  # no namespaces in this kernel, or /proc not mounted: nothing to map
        return True


def _numbered(directory: Path) -> list[Path]:
    try:
        return sorted(
            (entry for entry in directory.iterdir() if entry.name.isdigit()),
            key=lambda entry: int(entry.name),
        )
    except OSError:
        return []


def _read(directory: Path) -> Task | None:
    try:
        stat = (directory / "stat").read_bytes()
        status = (directory / "status").read_bytes()
    except OSError:
        return None
    # The name stands in brackets and may hold brackets and newlines itself; the numbers follow
    # the last one: state ppid pgrp session tty tpgid flags … (proc_pid_stat(5)).
    head, _, tail = stat.rpartition(b")")
    after = tail.split()
    fields = dict(_status_fields(status))
    try:
        return Task(
            tid=int(directory.name),
            tgid=int(fields[b"Tgid"]),
            ppid=int(after[1]),
            comm=head.partition(b"(")[2].decode("utf-8", "backslashreplace"),
            is_kernel=bool(int(after[6]) & _PF_KTHREAD),
            has_ended=after[0].decode("ascii") in _ENDED_STATES,
            inner_ids=tuple(int(part) for part in fields.get(b"NSpid", b"").split()),
        )
    except (KeyError, IndexError, ValueError):
        return None


def _status_fields(status: bytes) -> Iterator[tuple[bytes, bytes]]:
    for line in status.split(b"\n"):
        key, colon, value = line.partition(b":")
        if colon:
            # The kernel escapes newlines in the Name line: a target can not forge a field.
            yield key, value.strip()
