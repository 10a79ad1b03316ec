"""From what the user names (PIDs, TIDs, names, cgroups) to what the kernel's probes can filter on.

Everything is checked here, before a probe is loaded, so that a wrong id is one clear line.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from latrace.analysis.words import plural, visible
from latrace.tracer.cgroups import cgroup_mounts
from latrace.tracer.errors import HostError, NoTargetError, UsageError
from latrace.tracer.processes import (
    PROC,
    Task,
    descendants,
    in_initial_pid_namespace,
    processes,
    read_task,
    thread_count,
    threads,
)

_COMM_BYTES = 15  # TASK_COMM_LEN less its NUL
_MAX_LISTED = 6
MAX_PATTERNS = 8
"""Names, and cgroups, that the probes compare with at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The targets as the user named them."""

    pids: tuple[int, ...] = ()
    tids: tuple[int, ...] = ()
    comms: tuple[str, ...] = ()
    cgroups: tuple[str, ...] = ()
    children: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The targets as the tracer takes them, with words for the user."""

    pids: tuple[int, ...]
    tids: tuple[int, ...]
    comms: tuple[str, ...]
    cgroups: tuple[Path, ...]
    children: bool
    tasks: tuple[Task, ...]
    """The processes (or single threads) traced from the start."""
    description: str
    """`redis-server (pid 812, 4 threads)`; safe to print."""
    notes: tuple[str, ...]
    """What was decided on the way that the user should know, one sentence each; safe to print."""


def parse_ids(text: str, *, option: str) -> tuple[int, ...]:
    """The ids of a comma list such as `812,813`. Raises `UsageError` naming `option`."""
    ids: list[int] = []
    for part in _parts(text, option=option):
        if not (part.isascii() and part.isdigit() and 0 < int(part[:10]) <= 1 << 22):
            raise UsageError(
                f"{option} {visible(part)!r} is not a process or thread id",
                hint=f"give numbers: {option} 812 or {option} 812,813; names go with --comm",
            )
        ids.append(int(part))
    return tuple(dict.fromkeys(ids))


def parse_names(text: str, *, option: str) -> tuple[str, ...]:
    """The names of a comma list such as `redis-server,node*`."""
    return tuple(dict.fromkeys(_parts(text, option=option)))


def resolve(request: Request, *, proc: Path = PROC) -> Targets:
    """Check and translate `request` against the processes alive now.

    Raises `UsageError` for what can never be traced, `NoTargetError` for what is not there,
    `HostError` when our ids are not those the kernel's probes see.
    """
    if not (request.pids or request.tids or request.comms or request.cgroups):
        raise UsageError(
            "nothing to trace",
            hint="name a target: --pid, --tid, --comm or --cgroup; or: latrace run -- CMD",
        )
    if request.children and not (request.pids or request.comms or request.cgroups):
        raise UsageError(
            "--children follows processes, and --tid names single threads", hint="use --pid"
        )
    for option, values in (("--comm", request.comms), ("--cgroup", request.cgroups)):
        if len(values) > MAX_PATTERNS:
            raise UsageError(
                f"{option} names {len(values)}, and the probes compare {MAX_PATTERNS} at most",
                hint="a trailing * covers several names; a cgroup covers those below it",
            )
    _refuse_inner_namespace(proc)
    notes: list[str] = []
    by_pid = [_resolve_pid(pid, proc=proc, notes=notes) for pid in request.pids]
    by_tid = [_resolve_tid(tid, proc=proc, notes=notes) for tid in request.tids]
    comms = tuple(_resolve_comm(comm, notes=notes) for comm in request.comms)
    by_comm = _named(comms, proc=proc)
    cgroups = tuple(resolve_cgroup(cgroup, proc=proc) for cgroup in request.cgroups)
    by_cgroup = cgroup_members(cgroups, proc=proc)
    for cgroup in cgroups:
        if next(_cgroup_pids(cgroup), None) is None:
            notes.append(f"no process is in cgroup {visible(str(cgroup))} yet")
    roots = {task.tgid for task in (*by_pid, *by_comm, *by_cgroup)}
    below = descendants(roots, proc=proc) if request.children else []
    below = [task for task in below if task.tgid != _self_pid(proc)]
    tasks = {task.tid: task for task in (*by_pid, *by_tid, *by_comm, *by_cgroup, *below)}
    return Targets(
        pids=tuple(dict.fromkeys(task.tgid for task in (*by_pid, *below))),
        tids=tuple(dict.fromkeys(task.tid for task in by_tid)),
        comms=comms,
        cgroups=cgroups,
        children=request.children,
        tasks=tuple(tasks.values()),
        description=_describe(tuple(tasks.values()), cgroups=cgroups, proc=proc),
        notes=tuple(notes),
    )


def resolve_cgroup(name: str, *, proc: Path = PROC) -> Path:
    """The directory of cgroup `name`: absolute, or relative to a cgroup mount.

    The hierarchy must be v2 or v1's `cpu`: only these tell where a thread's CPU time comes from.
    """
    mounts = cgroup_mounts(proc)
    given = Path(name)
    if given.is_absolute() and given.is_dir():
        real = given.resolve()
        above = [mount.divides_cpu for mount in mounts if real.is_relative_to(mount.point)]
        if any(above):
            return real
        if above:
            raise UsageError(
                f"cgroup {visible(name)} is of another controller than cpu",
                hint="name the group in the cpu (v1) or the unified (v2) hierarchy",
            )
    # A name such as /system.slice/x.service, as /proc/PID/cgroup shows it, is relative too.
    candidates = [
        real
        for mount in mounts
        if mount.divides_cpu
        and (real := (mount.point / name.lstrip("/")).resolve()).is_dir()
        and real.is_relative_to(mount.point)
    ]
    if candidates:
        occupied = (real for real in candidates if next(_cgroup_pids(real), None) is not None)
        return next(occupied, candidates[0])
    raise NoTargetError(
        f"no cgroup {visible(name)}",
        hint="cat /proc/PID/cgroup shows the cgroups of a process",
    )


def _resolve_pid(pid: int, *, proc: Path, notes: list[str]) -> Task:
    task = read_task(pid, proc=proc)
    if task is None or task.is_kernel:
        inner = _from_inner_namespace(pid, option="--pid", proc=proc)
        if inner is not None:
            held = "is a kernel thread" if task is not None else "does not exist"
            notes.append(
                f"PID {pid} {held} on this host; traced is {_name(inner)},"
                f" which has this PID in its container and is PID {inner.tgid} here"
            )
            return inner
    if task is None or task.has_ended:
        raise _no_such("process", pid, option="--pid", ended=task is not None)
    if not task.is_leader:
        leader = read_task(task.tgid, proc=proc)
        owner = f"{_name(leader)} (PID {task.tgid})" if leader else f"PID {task.tgid}"
        raise UsageError(
            f"{pid} is not a process but a thread of {owner}",
            hint=f"--tid {pid} traces this thread, --pid {task.tgid} the whole process",
        )
    return _allowed(task, proc=proc)


def _resolve_tid(tid: int, *, proc: Path, notes: list[str]) -> Task:
    task = read_task(tid, proc=proc)
    if task is None or task.is_kernel:
        inner = _from_inner_namespace(tid, option="--tid", proc=proc)
        if inner is not None:
            held = "is a kernel thread" if task is not None else "does not exist"
            notes.append(
                f"thread {tid} {held} on this host; traced is {_name(inner)},"
                f" which has this id in its container and is {inner.tid} here"
            )
            return inner
    if task is None or task.has_ended:
        raise _no_such("thread", tid, option="--tid", ended=task is not None)
    return _allowed(task, proc=proc)


def _allowed(task: Task, *, proc: Path) -> Task:
    if task.is_kernel:
        raise UsageError(
            f"{task.tid} is the kernel thread {_name(task)}",
            hint="latrace traces programs; a kernel thread shows up as what they wait for",
        )
    if task.tgid == _self_pid(proc):
        raise UsageError(
            f"{task.tid} is latrace itself", hint="it never traces itself; name another process"
        )
    return task


def _no_such(what: str, ident: int, *, option: str, ended: bool) -> NoTargetError:
    if ended:
        return NoTargetError(
            f"{what} {ident} has ended already (a zombie)", hint="name one that still runs"
        )
    return NoTargetError(
        f"no {what} {ident}", hint=f"pgrep -a NAME lists PIDs; {option} takes those of this host"
    )


def _from_inner_namespace(ident: int, *, option: str, proc: Path) -> Task | None:
    """The one process (or thread) that has `ident` as its id in its own PID namespace."""
    found: list[Task] = []
    for process in processes(proc=proc):
        if len(process.inner_ids) < 2 or process.has_ended:
            continue
        tasks = [process] if option == "--pid" else threads(process.tgid, proc=proc)
        found += [task for task in tasks if task.inner_ids and task.inner_ids[-1] == ident]
    if len(found) > 1:
        listed = ", ".join(f"{task.tid} ({_name(task)})" for task in found[:_MAX_LISTED])
        more = f" and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
        raise UsageError(
            f"{ident} is the id of {len(found)} container processes: host {listed}{more}",
            hint=f"name one by its host id: {option} {found[0].tid}",
        )
    return found[0] if found else None


def _resolve_comm(comm: str, *, notes: list[str]) -> str:
    name = comm.removesuffix("*")
    if "*" in name or "?" in name or "[" in name:
        raise UsageError(
            f"--comm {visible(comm)}: only a trailing * is understood",
            hint="give the exact name, or the beginning of it: --comm 'node*'",
        )
    raw = name.encode()
    if len(raw) <= _COMM_BYTES:
        return comm
    kept = raw[:_COMM_BYTES].decode("utf-8", "ignore")
    notes.append(f"the kernel keeps {_COMM_BYTES} bytes of a name: tracing {visible(kept)}")
    return kept


def _named(comms: Sequence[str], *, proc: Path) -> list[Task]:
    """The user processes that have one of the names `comms` now; none of them may be missing."""
    if not comms:
        return []
    own = _self_pid(proc)
    candidates = [
        task
        for task in processes(proc=proc)
        if not task.is_kernel and not task.has_ended and task.tgid != own
    ]
    found: dict[int, Task] = {}
    for comm in comms:
        matching = [task for task in candidates if comm_matches(task.comm, comm)]
        if not matching:
            raise NoTargetError(
                f"no process is named {visible(comm)}",
                hint="ps -eo pid,comm lists the names; a trailing * matches a beginning",
            )
        found.update((task.tgid, task) for task in matching)
    return list(found.values())


def comm_matches(comm: str, pattern: str) -> bool:
    """Whether the command name `comm` is `pattern`, or begins with it when it ends in `*`."""
    return comm.startswith(pattern[:-1]) if pattern.endswith("*") else comm == pattern


def cgroup_members(cgroups: Iterable[Path], *, proc: Path = PROC) -> list[Task]:
    """The user processes in `cgroups` and the groups below them now, ourselves excepted."""
    own = _self_pid(proc)
    found: dict[int, Task] = {}
    for cgroup in cgroups:
        for pid in _cgroup_pids(cgroup):
            task = read_task(pid, proc=proc)
            if task and not task.is_kernel and not task.has_ended and task.tgid != own:
                found[task.tgid] = task
    return list(found.values())


def _cgroup_pids(cgroup: Path) -> Iterator[int]:
    """PIDs in `cgroup` and the groups below it."""
    for directory, _, _ in os.walk(cgroup):
        try:
            text = (Path(directory) / "cgroup.procs").read_text("ascii")
        except OSError:  # gone, or a threaded group
            continue
        yield from (int(line) for line in text.split())


def _describe(tasks: tuple[Task, ...], *, cgroups: tuple[Path, ...], proc: Path) -> str:
    groups = ", ".join(f"cgroup {visible(str(cgroup))}" for cgroup in cgroups)
    if not tasks:
        return groups
    if len(tasks) == 1:
        return (
            f"{groups}: {_describe_one(tasks[0], proc)}"
            if groups
            else _describe_one(tasks[0], proc)
        )
    leaders = [task for task in tasks if task.is_leader]
    unit = "processes" if len(leaders) == len(tasks) else "targets"
    listed = ", ".join(f"{_name(task)} {task.tid}" for task in tasks[:_MAX_LISTED])
    more = ", ..." if len(tasks) > _MAX_LISTED else ""
    prefix = f"{groups}: " if groups else ""
    return f"{prefix}{len(tasks)} {unit} ({listed}{more})"


def _describe_one(task: Task, proc: Path) -> str:
    if not task.is_leader:
        return f"thread {_name(task)} (tid {task.tid} of pid {task.tgid})"
    count = thread_count(task.tgid, proc=proc)
    return f"{_name(task)} (pid {task.tgid}, {plural(count, 'thread')})"


def _name(task: Task) -> str:
    return visible(task.comm) or "?"


def _self_pid(proc: Path) -> int:
    """Our process as `proc` numbers it."""
    try:
        return int(str((proc / "self").readlink()))
    except (OSError, ValueError):
        return os.getpid()


def _refuse_inner_namespace(proc: Path) -> None:
    if not in_initial_pid_namespace(proc=proc):
        raise HostError(
            "this shell is inside a container: its PIDs are not those the kernel's probes see",
            hint="run latrace on the host, or start the container with --pid=host",
        )


def _parts(text: str, *, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(
            f"{option} {visible(text)!r} has an empty part",
            hint=f"separate by single commas: {option} A,B",
        )
    return parts
